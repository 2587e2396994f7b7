"""Languages that take turns on several data-parallel ranks: all ranks use the same language and train one task."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import adapted, deltas_of, spiel_config
from support.models import tiny_llama
from support.ranks import launch, results_of, run_here
from torch.nn.parallel import DistributedDataParallel

from spiel_peft import LanguageCycler

# Starting the processes takes most of the time.
pytestmark = pytest.mark.slow

RANKS, STEPS = 2, 6
LANGUAGES, TASK = ["german", "spanish"], "task"


def model_with_languages(**fields: Any) -> PeftModel:
    model = adapted(tiny_llama(num_hidden_layers=1), adapter=LANGUAGES[0], density=0.2, seed=7)
    model.add_adapter(LANGUAGES[1], spiel_config(density=0.2, seed=1))
    model.add_adapter(TASK, spiel_config(density=0.2, seed=3, target_modules=["down_proj", "up_proj"], **fields))
    return model.train()


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(10 * step + rank))


def outcome(model: PeftModel, used: list[str]) -> dict[str, Any]:
    deltas = deltas_of(model, TASK)
    return {
        "used": used,
        "deltas": {name: (d.indices.clone(), d.values.detach().clone()) for name, d in deltas.items()},
    }


def parallel(rank: int, **fields: Any) -> dict[str, Any]:
    model = model_with_languages(**fields)
    # Before the model is wrapped, which reads off the parameters that require a gradient.
    LanguageCycler(model, LANGUAGES, TASK)
    ddp = DistributedDataParallel(model)
    cycler = LanguageCycler(ddp, LANGUAGES, TASK)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    used = []
    for step in range(STEPS):
        used.append(cycler.advance())
        ids = batch(rank, step)
        ddp(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(model, used)


SCENARIOS = {
    "fixed": partial(parallel, growth="none"),
    "moving": partial(parallel, regrow_every=3, accumulation_steps=2, total_steps=STEPS + 1),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_have_the_same_language_at_the_same_time_and_end_alike(name: str, launched: dict[str, Any]) -> None:
    first, second = results_of(launched, name)
    assert first["used"] == second["used"] and set(first["used"]) == set(LANGUAGES)
    for module, (indices, values) in first["deltas"].items():
        assert torch.equal(indices, second["deltas"][module][0]) and torch.equal(values, second["deltas"][module][1])


def test_two_ranks_do_what_one_process_does_with_both_batches(launched: dict[str, Any]) -> None:
    model = model_with_languages(growth="none")
    cycler = LanguageCycler(model, LANGUAGES, TASK)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        cycler.advance()
        for ids in (batch(rank, step) for rank in range(RANKS)):
            (model(ids, labels=ids).loss / RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
    first, _ = results_of(launched, "fixed")
    for module, delta in deltas_of(model, TASK).items():
        assert torch.allclose(delta.values, first["deltas"][module][1], atol=1e-6)


def test_positions_moved(launched: dict[str, Any]) -> None:
    fixed, moving = (results_of(launched, name)[0] for name in ("fixed", "moving"))
    assert any(not torch.equal(moving["deltas"][m][0], indices) for m, (indices, _) in fixed["deltas"].items())


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
