import torch

from curvature.populations import batches
from curvature.targets import mlp_blocks
from surgery.rankings import plan_surgery
from surgery.rankings.neurons import refit_order
from surgery.repair import refit, refit_in_order, refitted, with_mlp_bias
from surgery.shrink import shrink


def test_refit_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 10, generator=generator, dtype=torch.float64)
    inputs[:, 5:] = inputs[:, :5] @ torch.randn(5, 5, generator=generator, dtype=torch.float64)
    inputs = inputs + 0.1 * torch.randn(400, 10, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    keep = torch.tensor([0, 2, 3, 6, 7, 9])
    found = refitted(weight, inputs.T @ inputs / 400, keep, 0.0)
    expected = torch.linalg.lstsq(inputs[:, keep], inputs @ weight.T).solution.T
    assert torch.allclose(found, expected, atol=1e-8)


def test_keeping_all_neurons_gives_the_weights_back():
    weight, x = torch.randn(3, 6), torch.randn(20, 6)
    assert torch.allclose(
        refitted(weight, x.T @ x, torch.arange(6), 0.1).float(), weight, atol=1e-6
    )


def test_refit_leaves_less_error_than_the_bare_cut(tiny_llama, factors):
    plan = plan_surgery(tiny_llama, "random", {}, strength=0.5)
    small = shrink(tiny_llama, plan)
    for block in mlp_blocks(small):
        name = block.down.name
        old = tiny_llama.get_submodule(name).weight.detach().double()
        A = factors["reasoning"][name].A.double()
        keep = plan.tensors[f"layers.{block.layer}.keep"]
        bare = old.clone()
        bare[:, keep] = 0
        bare_error = float(((bare @ A) * bare).sum() / ((old @ A) * old).sum())
        left = refit(small, tiny_llama, plan, factors["reasoning"])[name]
        assert 0 < left < bare_error


def test_greedy_order_takes_the_replaceable_neuron_first():
    """Neuron 2 is a copy of neuron 0: one of them goes first, then the other is no longer
    replaceable.
    """
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] = x[:, 0]
    scores = refit_order(x.T @ x / 500, torch.ones(4, dtype=torch.float64), 1, 1e-6)
    assert int(scores.argmin()) in (0, 2)
    other = 2 - int(scores.argmin())
    again = refit_order(x.T @ x / 500, torch.ones(4, dtype=torch.float64), 2, 1e-6)
    assert int((again < 0).sum()) == 2
    assert not (again[0] < 0 and again[2] < 0)
    assert float(scores[other]) > 0.5


def test_greedy_costs_equal_a_direct_inverse():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A = x.T @ x / 300
    curvature = torch.tensor([3.0, 0.1, 2.0, 0.2, 1.0, 4.0], dtype=torch.float64)
    scores = refit_order(A, curvature, 2, 1e-4)
    stay = (scores >= 0).nonzero()[:, 0]
    metric = A + 1e-4 * A.trace() / 6 * torch.eye(6, dtype=torch.float64)
    expected = curvature[stay] / torch.linalg.inv(metric[stay][:, stay]).diagonal()
    assert torch.allclose(scores[stay], expected)


@torch.no_grad()
def test_refit_in_order_brings_the_logits_closer_to_the_teacher(tiny_llama, tokenizer, reasoning):
    with torch.no_grad():
        for p in tiny_llama.parameters():
            if p.ndim == 2:
                p.mul_(4)
    rows = list(batches(reasoning, tokenizer, width=96, batch_size=16))
    plan = plan_surgery(tiny_llama, "random", {}, strength=0.6)
    small = shrink(tiny_llama, plan)

    def distance():
        valid = rows[0].mask.bool()
        a, b = (m(input_ids=rows[0].ids).logits[valid] for m in (tiny_llama, small))
        return float((a - b).pow(2).mean())

    before = distance()
    refit_in_order(small, tiny_llama, lambda: rows)
    after_first = distance()
    assert after_first < 0.7 * before


@torch.no_grad()
def test_the_mean_output_of_removed_neurons_goes_into_the_bias(tiny_llama, tokenizer, reasoning):
    rows = list(batches(reasoning, tokenizer, width=96, batch_size=16))
    plan = plan_surgery(tiny_llama, "random", {}, strength=0.5)
    distances = []
    for biased in (False, True):
        small = shrink(tiny_llama, plan)
        small = with_mlp_bias(small) if biased else small
        refit_in_order(small, tiny_llama, lambda: rows)
        # After the first layer, where the fit sees all that there is to repair.
        pairs = [
            [
                m(input_ids=r.ids, output_hidden_states=True).hidden_states[1][r.mask.bool()]
                for r in rows
            ]
            for m in (tiny_llama, small)
        ]
        a, b = (torch.cat(p) for p in pairs)
        distances.append(float((a - b).pow(2).mean()))
    assert small.config.mlp_bias
    assert all(block.down.bias.abs().max() > 0 for block in mlp_blocks(small))
    assert distances[1] < distances[0]
