"""The examples in the docstrings of the public interface run, on the shipped demo checkpoints in an empty folder.

The examples share these names: `BASE` and `DONOR` (folders of checkpoints), `base` and `donor` (models from there),
`batches` and `dataset` (examples for these models), `scores`, `mask`; `math` and `code` are folders of two adapters.
"""

from __future__ import annotations

import doctest
import inspect
import shutil
import textwrap

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import act_peft
from act_peft import ActError, ActModel, ChannelMask, ChannelScores, analysis, create_adapter, localize
from act_peft.demo.family import BASE, DONOR

DOCUMENTED = {
    name: value
    for name, value in vars(act_peft).items()
    if name in act_peft.__all__
    and callable(value)
    and value is not ActModel  # PEFT makes it
    and not (inspect.isclass(value) and issubclass(value, (ActError, Warning)))
}
DOCUMENTED["ChannelScores.top"] = ChannelScores.top
DOCUMENTED |= {name: getattr(analysis, name) for name in analysis.__all__ if name[0].islower()}


class _ShownOutput(doctest.OutputChecker):
    """Compares the output only where the docstring shows one."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def example_in(documented: object) -> str:
    """The text of the section `Example:` of a docstring."""
    _, _, example = inspect.getdoc(documented).partition("\nExample:\n")
    return textwrap.dedent(example)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (4, 8), generator=generator)
    batches = [{"input_ids": part, "labels": part.clone()} for part in ids.split(2)]
    base, donor = (AutoModelForCausalLM.from_pretrained(path) for path in (BASE, DONOR))
    scores = localize(base, donor, batches, show_progress=False)
    mask = scores.top(0.1, scope="module")
    for name, target in (("math", "down_proj"), ("code", "up_proj")):
        chosen = {module: index for module, index in mask.items() if module.endswith((target, "o_proj"))}
        create_adapter(BASE, DONOR, ChannelMask(chosen, mask.num_channels), folder / name)
    dataset = [{"input_ids": row, "labels": row.clone()} for row in ids]
    return folder, {"batches": batches, "dataset": dataset, "scores": scores, "mask": mask}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Trainer's own imports
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # no accelerator
@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_runs(name, shared, tmp_path, monkeypatch):
    example = example_in(DOCUMENTED[name])
    assert ">>> " in example, f"{name}: the docstring has no example (add a section `Example:` at its end)"
    folder, values = shared
    for adapter in ("math", "code"):
        shutil.copytree(folder / adapter, tmp_path / adapter)
    monkeypatch.chdir(tmp_path)
    names = {
        **{public: getattr(act_peft, public) for public in act_peft.__all__},
        **{"torch": torch, "PeftModel": PeftModel, "get_peft_model": get_peft_model},
        **{"Trainer": Trainer, "TrainingArguments": TrainingArguments},
        **{"BASE": str(BASE), "DONOR": str(DONOR)},
        **{model: AutoModelForCausalLM.from_pretrained(path) for model, path in (("base", BASE), ("donor", DONOR))},
        **values,
    }
    test = doctest.DocTestParser().get_doctest(example, names, name, None, 0)
    report: list[str] = []
    doctest.DocTestRunner(_ShownOutput()).run(test, out=report.append)
    assert not report, "".join(report)
