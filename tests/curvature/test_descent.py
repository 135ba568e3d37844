import copy

import pytest
import torch
from torch.nn import functional as F

from curvature.descent import add_gradients, fine_tune, population_loss, schedule_share
from curvature.forward import CausalForward
from curvature.populations import Batch, batches

SETTINGS = {"steps": 12, "lr": 1e-2, "batch_size": 4, "width": 32, "seed": 1}


def test_population_loss_is_the_mean_over_scored_tokens(tiny_llama, tokenizer, memorized):
    (batch,) = batches(memorized, tokenizer, width=64, batch_size=16)
    logits = tiny_llama(input_ids=batch.ids, attention_mask=batch.mask).logits
    total, n = 0.0, 0
    for r, t in batch.scored.nonzero().tolist():
        total += float(F.cross_entropy(logits[r, t - 1 : t], batch.ids[r, t : t + 1]))
        n += 1
    assert float(population_loss(tiny_llama, batch).detach()) == pytest.approx(total / n, rel=1e-5)
    with pytest.raises(ValueError, match="no scored token"):
        population_loss(tiny_llama, Batch(batch.ids, batch.mask, torch.zeros_like(batch.scored)))


@pytest.mark.parametrize(("rows", "chunk"), [(16, 1 << 25), (16, 300), (3, 1 << 25)])
def test_gradients_in_pieces_are_those_of_the_loss(
    rows, chunk, tiny_llama, tokenizer, memorized, monkeypatch
):
    """Whatever rows and logits stand in memory at a time; autograd on the whole batch is the
    reference."""
    (batch,) = batches(memorized, tokenizer, width=64, batch_size=16)
    loss = population_loss(tiny_llama, batch)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in tiny_llama.named_parameters()}
    monkeypatch.setattr("curvature.forward.CHUNK", chunk)
    trained = list(tiny_llama.parameters())
    found = add_gradients(CausalForward(tiny_llama), batch, trained, rows)
    assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in tiny_llama.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
    empty = Batch(batch.ids, batch.mask, torch.zeros_like(batch.scored))
    with pytest.raises(ValueError, match="no scored token"):
        add_gradients(CausalForward(tiny_llama), empty, trained, rows)


def test_fine_tuning_learns_reproducibly_and_restores_the_mode(tiny_llama, tokenizer, memorized):
    twin = copy.deepcopy(tiny_llama)
    losses = fine_tune(tiny_llama, tokenizer, memorized, **SETTINGS)
    torch.manual_seed(99)
    again = fine_tune(twin, tokenizer, memorized, **SETTINGS)
    assert losses == again
    assert losses[-1] < losses[0] - 0.5
    assert not tiny_llama.training
    assert all(p.grad is None for p in tiny_llama.parameters())


def test_projection_holds_weights_still(tiny_llama, tokenizer, memorized):
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()

    def project():
        weight.grad[:5] = 0

    fine_tune(tiny_llama, tokenizer, memorized, project=project, **SETTINGS)
    assert torch.equal(weight[:5], before[:5])
    assert not torch.equal(weight[5:], before[5:])


def test_only_chosen_parameters_are_trained(tiny_llama, tokenizer, memorized):
    before = copy.deepcopy(tiny_llama.state_dict())
    chosen = [tiny_llama.model.layers[1].mlp.down_proj.weight]
    fine_tune(tiny_llama, tokenizer, memorized, parameters=chosen, **SETTINGS)
    changed = [k for k, v in tiny_llama.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]


def test_bad_input_of_fine_tuning(tiny_llama, tokenizer, memorized):
    with pytest.raises(ValueError, match="unknown schedule"):
        fine_tune(tiny_llama, tokenizer, memorized, schedule="steps", **SETTINGS)
    with pytest.raises(ValueError, match="nothing to train"):
        fine_tune(tiny_llama, tokenizer, memorized, **{**SETTINGS, "steps": 0})
    with torch.no_grad():
        tiny_llama.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite at step 0"):
        fine_tune(tiny_llama, tokenizer, memorized, **SETTINGS)
    assert not tiny_llama.training


def test_schedules():
    cosine = [schedule_share(k, 100, "cosine") for k in range(100)]
    assert max(cosine) == pytest.approx(1.0)
    assert cosine[0] == pytest.approx(0.2)
    assert cosine[-1] == pytest.approx(0.1, abs=0.01)
    assert [schedule_share(k, 10, "constant") for k in (0, 5, 9)] == [1.0, 1.0, 1.0]
