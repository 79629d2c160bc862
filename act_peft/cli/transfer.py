"""`act-peft transfer`: an adapter from two checkpoints on disk, or from a fitted transfer."""

from __future__ import annotations

import argparse
from pathlib import Path

from act_peft.cli.files import TARGETS, add_output
from act_peft.cli.imports import importing

SUMMARY = "Make an adapter from the donor's difference in the selected channels, without loading a model."
EXAMPLE = "act-peft transfer --base org/base --donor org/donor --mask mask.safetensors --output ability"
_SCALE = 0.4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--base", help="checkpoint of the base: folder or Hub id (only with --fitted not needed, where it is found)"
    )
    parser.add_argument("--donor", help="checkpoint of the donor: folder or Hub id; only without --fitted")
    parser.add_argument("--fitted", type=Path, help="file of a fitted transfer, from `act-peft fit` (none)")
    parser.add_argument(
        "--mask", type=Path, help="file of the mask, from `act-peft select`; only for ACT adapters, the usual output"
    )
    parser.add_argument(
        "--rank",
        type=int,
        help="only with --fitted: write a LoRA adapter of this rank; without --mask and --rank, a merged checkpoint",
    )
    parser.add_argument(
        "--embedding-rank",
        type=int,
        metavar="RANK",
        help="only with --rank: rank of the token embedding's factors; without it the embedding does not move",
    )
    parser.add_argument(
        "--tokens",
        type=float,
        metavar="SHARE",
        help="only with --mask or --rank of a fit: share of the tokens whose embeddings move",
    )
    parser.add_argument("--norms", action="store_true", help="only with --rank: save norms as whole modules")
    parser.add_argument(
        "--transfer-scale",
        type=float,
        metavar="SCALE",
        help=f"share of the donor's difference that is added; only without --fitted ({_SCALE})",
    )
    parser.add_argument(
        "--no-bias",
        action="store_true",
        help="leave biases as they are, which serving engines ask for; only without --fitted",
    )
    parser.add_argument(
        "--target",
        choices=TARGETS,
        default="peft",
        help="only with --rank: the program that is to load the LoRA adapter (peft)",
    )
    add_output(parser, what="folder of the adapter")
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """Make the adapter and print what was written."""
    if arguments.fitted is not None:
        _run_fitted(arguments)
        return
    _refuse(
        arguments, "only used with --fitted", rank=None, embedding_rank=None, tokens=None, norms=False, target="peft"
    )
    missing = [f"--{name}" for name in ("base", "donor", "mask") if getattr(arguments, name) is None]
    if missing:
        arguments.refuse(f"the following arguments are required: {', '.join(missing)}")
    with importing():
        from act_peft import create_adapter

    create_adapter(
        arguments.base,
        arguments.donor,
        arguments.mask,
        arguments.output,
        transfer_scale=_SCALE if arguments.transfer_scale is None else arguments.transfer_scale,
        include_bias=not arguments.no_bias,
        overwrite=arguments.overwrite,
        show_progress=True,
    )
    size = (arguments.output / "adapter_model.safetensors").stat().st_size
    print(f"{arguments.output}: adapter, {size / 1e6:.1f} MB")


def _run_fitted(arguments: argparse.Namespace) -> None:
    """An adapter or a checkpoint made of a fitted transfer."""
    _refuse(arguments, "not used with --fitted", donor=None, transfer_scale=None, no_bias=False)
    if arguments.mask is not None:
        _refuse(arguments, "not used with --mask", rank=None, embedding_rank=None, norms=False, target="peft")
    elif arguments.rank is None:
        why = "not used for a merged checkpoint, which has all changes"
        _refuse(arguments, why, embedding_rank=None, tokens=None, norms=False, target="peft")
        if arguments.base is None:
            arguments.refuse("a merged checkpoint needs --base (or give --mask or --rank for an adapter)")
    with importing():
        from act_peft import FittedTransfer

    fitted = FittedTransfer.load(arguments.fitted)
    options = {"base": arguments.base, "overwrite": arguments.overwrite}
    output = arguments.output
    if arguments.mask is not None:
        fitted.to_adapter(arguments.mask, output, tokens=arguments.tokens, **options)
        what = "adapter"
    elif arguments.rank is not None:
        made = fitted.to_lora(
            arguments.rank,
            output,
            target=arguments.target,
            embedding_rank=arguments.embedding_rank,
            norms=arguments.norms,
            tokens=arguments.tokens,
            **options,
        )
        what = f"LoRA adapter of rank {arguments.rank}, which loses {made.error:.1%} of what the fit gains"
    else:
        fitted.merge(arguments.base, output, overwrite=arguments.overwrite)
        what = "merged checkpoint"
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(f"{output}: {what}, {size / 1e6:.1f} MB")


def _refuse(arguments: argparse.Namespace, why: str, **unset: object) -> None:
    """End as after other bad arguments if one is given that would not be used."""
    for name, value in unset.items():
        if getattr(arguments, name) != value:
            arguments.refuse(f"argument --{name.replace('_', '-')}: {why}")
