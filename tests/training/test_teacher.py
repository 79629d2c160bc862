"""A teacher that answers each sample once: its answers are those of the model, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from act_peft import ActValueError
from act_peft.batches.evaluation import evaluation
from act_peft.batches.predictions import find_predictions, logits_of
from act_peft.training.answer_logits import AnswerLogits
from act_peft.training.teacher import Teacher
from tests.support.teaching import keep_batch
from tests.support.tiny_models import build


def open_teacher(max_cached_tokens=100):
    """A teacher, its model, and a list that the numbers of samples of its passes are added to."""
    model, passes = build("llama"), []
    model.model.register_forward_hook(lambda module, args, output: passes.append(len(output.last_hidden_state)))
    teacher = Teacher(
        AnswerLogits(model),
        lambda: evaluation(model),
        without_adapters=False,
        max_cached_tokens=max_cached_tokens,
    )
    return teacher, model, passes


def of_rows(inputs, rows, *, right=0):
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {n: F.pad(t[torch.tensor(rows)], (0, right), value=fill[n]) for n, t in inputs.items()}


def check(teacher, model, inputs):
    batch = find_predictions(inputs)
    found = teacher.logits(batch)
    with torch.no_grad():
        torch.testing.assert_close(found, logits_of(model, batch)[batch.positions], rtol=1e-4, atol=1e-5)


def answered(teacher, passes, inputs):
    """Numbers of samples that the model ran on for a batch."""
    passes.clear()
    teacher.logits(find_predictions(inputs))
    return list(passes)


def test_samples_are_found_again_in_other_batches():
    teacher, model, passes = open_teacher()
    inputs = keep_batch()
    check(teacher, model, of_rows(inputs, [0, 1]))
    check(teacher, model, of_rows(inputs, [2, 3]))
    for rows, right in (([1, 0], 0), ([3, 0], 4), ([2, 1, 3], 1)):
        check(teacher, model, of_rows(inputs, rows, right=right))
        assert answered(teacher, passes, of_rows(inputs, rows, right=right)) == []


def test_only_new_samples_are_asked():
    teacher, model, passes = open_teacher()
    inputs = keep_batch()
    teacher.logits(find_predictions(of_rows(inputs, [1])))
    assert answered(teacher, passes, of_rows(inputs, [0, 1, 2], right=2)) == [2]
    check(teacher, model, of_rows(inputs, [0, 1, 2, 3]))


def test_samples_without_an_answer_are_not_asked():
    teacher, model, passes = open_teacher()
    inputs = keep_batch()
    inputs["labels"][2] = -100
    teacher.logits(find_predictions(of_rows(inputs, [0, 1])))
    assert answered(teacher, passes, inputs) == [1]
    assert answered(teacher, passes, inputs) == []
    check(teacher, model, inputs)


def test_what_has_no_room_is_asked_each_time():
    teacher, model, passes = open_teacher(max_cached_tokens=7)  # two samples of three tokens
    for _ in range(3):
        check(teacher, model, keep_batch())
    assert answered(teacher, passes, keep_batch()) == [2]
    nothing, model, passes = open_teacher(max_cached_tokens=0)
    check(nothing, model, keep_batch())
    assert answered(nothing, passes, keep_batch()) == [4]


def see_the_tokens(module, args, kwargs, output):
    """Logits that depend on the tokens in a second way."""
    return type(output)(logits=output.logits * kwargs["input_ids"].float().mean())


def test_a_model_that_cannot_be_taken_apart_is_asked_each_time():
    teacher, model, passes = open_teacher()
    model.register_forward_hook(see_the_tokens, with_kwargs=True)
    for seed in (5, 6, 5):
        check(teacher, model, keep_batch(seed))
    assert answered(teacher, passes, keep_batch()) == [4]


def test_a_batch_of_more_than_tokens_is_asked_each_time():
    teacher, model, passes = open_teacher()
    ids = keep_batch()["input_ids"]
    embeddings = model.get_input_embeddings()(ids).detach()
    for _ in range(2):
        check(teacher, model, {"inputs_embeds": embeddings, "labels": keep_batch()["labels"]})
    assert answered(teacher, passes, {"inputs_embeds": embeddings, "labels": keep_batch()["labels"]}) == [4]


def test_a_released_one_knows_what_it_has_learned_and_no_more():
    teacher, model, _ = open_teacher(max_cached_tokens=12)
    assert teacher.learn(find_predictions(keep_batch()))
    assert not teacher.learn(find_predictions(keep_batch(seed=6)))  # no room
    teacher.release()
    check(teacher, model, of_rows(keep_batch(), [3, 1], right=1))
    with pytest.raises(ActValueError, match="a sample that the donor did not answer before it was released"):
        teacher.logits(find_predictions(keep_batch(seed=6)))


def test_tokens_and_answers_in_low_precision_stay_so():
    model = build("llama", dtype=torch.bfloat16)
    teacher = Teacher(AnswerLogits(model), lambda: evaluation(model), without_adapters=False, max_cached_tokens=100)
    for _ in range(2):
        found = teacher.logits(find_predictions(keep_batch()))
    batch = find_predictions(keep_batch())
    assert found.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(found, logits_of(model, batch)[batch.positions], rtol=0.02, atol=0.02)
