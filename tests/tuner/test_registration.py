"""PEFT knows ACT after `import act_peft`, however often; a method of that name in PEFT itself is an error."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import act_peft
from act_peft.errors import ActError
from act_peft.tuner.registration import register


def test_act_is_a_member_of_peft_s_enum():
    member = PeftType("ACT")
    assert member is PeftType.ACT is PeftType["ACT"]
    assert isinstance(member, PeftType)
    assert (member.name, member.value) == ("ACT", "ACT")
    assert member in list(PeftType)
    assert "ACT" in PeftType.__members__
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(set(PeftType))


def test_the_member_survives_pickle_copy_and_json():
    member = PeftType("ACT")
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "ACT"}


def test_peft_s_tables_know_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["ACT"] is act_peft.ActConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["ACT"] is act_peft.ActModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["ACT"] == "act_delta_"


def test_the_rest_of_peft_s_enum_is_untouched():
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType("NOSUCHMETHOD")


def test_reloading_is_harmless():
    members = list(PeftType)
    importlib.reload(act_peft)
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING["ACT"] is act_peft.ActConfig


def test_a_fresh_import_registers_the_fresh_classes():
    code = (
        "import sys, act_peft\n"
        "from peft.utils import PeftType\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs\n"
        "old = act_peft.ActConfig\n"
        "for name in [n for n in sys.modules if n.startswith('act_peft')]: del sys.modules[name]\n"
        "import act_peft\n"
        "assert act_peft.ActConfig is not old and configs[PeftType.ACT] is act_peft.ActConfig\n"
        "assert list(PeftType).count('ACT') == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_method_of_this_name_in_peft_itself_is_an_error(monkeypatch):
    with pytest.raises(ActError, match=r"PEFT has its own method named ACT .*use an older PEFT"):
        register(peft.LoraConfig, peft.LoraModel)
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("ACT"))
    with pytest.raises(ActError, match="PEFT has its own method named ACT"):
        register(act_peft.ActConfig, act_peft.ActModel)


def test_without_the_import_peft_does_not_know_the_method():
    code = "from peft.utils import PeftType\nassert 'ACT' not in PeftType.__members__\n"
    subprocess.run([sys.executable, "-c", code], check=True)
