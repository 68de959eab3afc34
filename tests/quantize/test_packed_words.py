"""Words of other programs, against words written by hand and a packer that follows their loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2x.quantize.packed_words import unpack_awq, unpack_inputs, unpack_outputs
from tests.packed_checkpoint import pack_awq, pack_gptq


def test_gptq_words_hold_eight_inputs_low_bits_first() -> None:
    # Two words along the inputs of one output, then of a second.
    words = np.array([[0x76543210, 0x0], [0x7EDCBA98, 0xF]], np.int64).astype(np.int32)
    codes = unpack_inputs(words, 4)
    assert codes.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 7], 
                              [0] * 8 + [15] + [0] * 7]  # fmt: skip


def test_gptq_words_of_eight_bits_hold_four() -> None:
    words = np.array([[0x7F020100]], np.int32)
    assert unpack_inputs(words, 8).tolist() == [[0, 1, 2, 127]]
    assert unpack_outputs(words, 8).tolist() == [[0], [1], [2], [127]]


def test_a_set_sign_bit_is_a_code_and_no_sign() -> None:
    words = np.array([[-1]], np.int32)
    assert unpack_inputs(words, 4).tolist() == [[15] * 8]
    assert unpack_outputs(words, 8).tolist() == [[255]] * 4


def test_awq_words_hold_outputs_0_2_4_6_1_3_5_7() -> None:
    # Nibbles from the low end: outputs 0, 2, 4, 6, 1, 3, 5, 7, each with its own number.
    words = np.array([[0x75316420]], np.int32)
    assert unpack_awq(words)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("bits", [4, 8])
@given(seed=st.integers(0, 1000), words=st.integers(1, 5), other=st.integers(1, 9))
def test_packing_is_undone(bits: int, seed: int, words: int, other: int) -> None:
    packed = words * 32 // bits
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (other, packed))
    assert np.array_equal(unpack_inputs(pack_gptq(codes, bits).T, bits), codes)
    assert np.array_equal(unpack_outputs(pack_gptq(codes, bits), bits), codes.T)
    if bits == 4:
        assert np.array_equal(unpack_awq(pack_awq(codes)), codes.T)
