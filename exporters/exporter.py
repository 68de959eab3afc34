"""``export``: a checkpoint folder or hub id to a bundle, whatever the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen2x.exporters.bit_budget import SCHEMES, plan_within_budget, typical_losses
from qwen2x.exporters.bundle_writer import write_bundle
from qwen2x.exporters.calibration import OnLayer
from qwen2x.exporters.checkpoint import Checkpoint
from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.export_plan import Plan
from qwen2x.exporters.hub import resolve_source, source_id
from qwen2x.exporters.import_plan import claimed_schemes, imported_bit_plan, imported_options
from qwen2x.exporters.options import Options
from qwen2x.exporters.packed_matrices import Order, PackedMatrices
from qwen2x.exporters.staging import require_absent
from qwen2x.exporters.weight_writer import Progress
from qwen2x.quantize.plan import BitPlan


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written: the folder and its manifest."""

    bundle: Path
    manifest: dict[str, Any]


def export(
    source: str | Path,
    target: str = "onnx",
    *,
    out: str | Path,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    on_layer: OnLayer | None = None,
    source_name: str | None = None,
    **options: Any,
) -> Export:
    """Exports a Qwen2 checkpoint.

    Args:
        source: a Hugging Face folder or a hub id.
        target: ``onnx`` or ``mlx``.
        out: the bundle's folder; it appears when all of it is on disk.
        revision: branch, tag or commit of a hub id.
        force: replace an existing folder.
        progress: called with bytes written and bytes in all.
        on_layer: called with what is done to layers, with how many, and of how many.
        source_name: what the manifest calls the source, if not its id or folder name.
        **options: the other fields of ``Options``: bits, group_size, bits_per_weight, max_bytes,
            asymmetric, prefer, method, calibration, kv_bits, dtype, device, max_context, graph.

    Raises:
        InputError: a source, option or folder that does not fit; nothing is left behind.
    """
    chosen = Options(target=target, **options)
    # Before anything is fetched, since that may take hours.
    require_absent(Path(out).absolute(), force)
    folder = resolve_source(source, revision=revision)
    chosen = _without_text(chosen, folder)
    manifest = write_bundle(
        folder,
        Path(out),
        lambda checkpoint, bit_plan: plan_checkpoint(checkpoint, chosen, bit_plan),
        chosen,
        source_id=source_name or source_id(source),
        force=force,
        progress=progress or (lambda done, total: None),
        on_layer=on_layer or (lambda stage, done, total: None),
    )
    return Export(bundle=Path(out), manifest=manifest)


def _without_text(options: Options, folder: Path) -> Options:
    """Method auto, where the checkpoint cannot read a text, is rounding to nearest."""
    if options.method != "auto" or not options.is_calibrated or options.has_budget:
        return options
    if (folder / "tokenizer.json").is_file():
        return options
    return replace(options, method="rtn", asymmetric=False, prefer="quality")


def plan_checkpoint(
    checkpoint: Checkpoint, options: Options, bit_plan: BitPlan | None = None
) -> Plan:
    """What an export will write; of a quantized checkpoint, zero points and orders are read.

    Without ``bit_plan`` matrices have the schemes that options or checkpoint name.

    Raises:
        CheckpointError: zero points or orders that cannot be carried over.
        SchemeError, BackendError, ConfigError: options that do not fit the model or each other.
    """
    config = checkpoint.config
    if config.quantization is None:
        return plan_export(config, options, bit_plan)
    packed = PackedMatrices(checkpoint, config.quantization)
    bit_plan = imported_bit_plan(config, config.quantization, options, packed.schemes())
    return plan_export(config, options, bit_plan, packed.orders)


def plan_export(
    config: Qwen2Config,
    options: Options,
    bit_plan: BitPlan | None = None,
    orders: Mapping[str, Order] | None = None,
) -> Plan:
    """What an export will write, without reading a weight.

    Args:
        config: the model.
        options: what was chosen.
        bit_plan: the scheme of every unit; without it what options and config say, and where
            measurements will decide, what is to be expected.
        orders: of a quantized checkpoint, see ``PackedMatrices``.

    Raises:
        SchemeError, BackendError, ConfigError: options that do not fit the model or each other.
    """
    orders = orders or {}
    if (quantization := config.quantization) is not None:
        claimed = claimed_schemes(config, quantization)
        bit_plan = bit_plan or imported_bit_plan(config, quantization, options, claimed)
        options = imported_options(options, bit_plan, orders)
    elif bit_plan is None and options.is_planned:
        losses = typical_losses(config, SCHEMES)
        return plan_within_budget(
            config, options, losses, lambda found: plan_export(config, options, found)
        )
    schemes = bit_plan or options.bit_plan(config)
    if options.target == "mlx":
        from qwen2x.exporters.mlx_export import plan_mlx

        return plan_mlx(config, options, schemes)
    from qwen2x.exporters.onnx_export import plan_onnx

    return plan_onnx(config, options, schemes, orders)
