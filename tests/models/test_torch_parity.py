"""Logits, gradients of a DPO loss, and tensors, against transformers' own torch classes at random small shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.losses import make_dpo_loss
from jdpo.models.families import FAMILIES, read_model_config
from jdpo.models.transformer import Transformer, make_apply_fn
from jdpo.models.weights.folder_names import by_model_name, carried, is_carried, model_names
from jdpo.models.weights.loading import load_params
from jdpo.types import PreferenceBatch
from tests.models.hf_arrays import hf_arrays
from tests.models.torch_cases import CASE_NAMES, CASES, save, torch_model

pytestmark = pytest.mark.torch

LENGTH, BETA = 12, 0.5


class Case(NamedTuple):
    """A torch model, its folder, and rows to run."""

    reference: Any
    folder: Path
    model: Transformer
    rng: np.random.Generator


@pytest.fixture(params=list(enumerate(CASES)), ids=CASE_NAMES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    seed, (prefix, settings) = request.param
    reference = torch_model(prefix, settings, seed)
    save(reference, tmp_path)
    return Case(reference, tmp_path, Transformer(read_model_config(tmp_path)), np.random.default_rng(seed))


def saved_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: values for path in folder.glob("*.safetensors") for name, values in load_file(path).items()}


def padded(rng: np.random.Generator, vocab_size: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask [4, LENGTH], padded on the right; with `left`, every other row on the left."""
    tokens = rng.integers(0, vocab_size, (4, LENGTH))
    lengths, lefts = rng.integers(5, LENGTH + 1, 4), np.array([left, False, left, False])
    slots = np.where(lefts[:, None], np.arange(LENGTH)[::-1], np.arange(LENGTH))
    return tokens, slots < lengths[:, None]


def torch_logits(reference: Any, tokens: np.ndarray, mask: np.ndarray) -> Any:
    import torch

    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    return reference(torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), position_ids=positions).logits


def test_every_family_has_two_cases_or_more() -> None:
    import transformers

    folders = [getattr(transformers, f"{name}Config").model_type for name, _ in CASES]
    with_experts = ("gpt_oss", "mixtral", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next")
    dense = {name for name in FAMILIES if name not in with_experts}
    assert {name for name in dense if folders.count(name) < 2} == set()


def test_logits_gradients_and_tensors_equal_those_of_torch(case: Case) -> None:
    import torch

    params, vocab_size = load_params(case.folder, case.model), case.model.config.vocab_size
    saved = saved_tensors(case.folder)
    saved = by_model_name(saved, case.model.config)
    for name, values in hf_arrays(params, case.model.config):
        np.testing.assert_array_equal(values, saved.pop(name), err_msg=name)
    # What remains belongs to other parts of a multimodal model.
    assert all(is_carried(name, case.model.config) for name in saved)
    assert bool(saved) == hasattr(case.reference.config, "vision_config")

    apply_fn = make_apply_fn(case.model)
    tokens, mask = padded(case.rng, vocab_size, left=True)
    pair_tokens, pair_mask = (x.reshape(2, 2, LENGTH) for x in padded(case.rng, vocab_size, left=False))
    completion = pair_mask & (np.arange(LENGTH) >= 3)
    reference_logps = case.rng.normal(-40, 3, (2, 2)).astype(np.float32)
    batch = PreferenceBatch(pair_tokens, pair_mask, completion, reference_logps)
    loss_fn = make_dpo_loss(apply_fn, beta=BETA)

    @jax.jit
    def run(params: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda params: loss_fn(params, None, batch)[0])(params)
        return apply_fn(params, tokens, mask), loss, grads

    logits, loss, grads = run(params)
    with torch.no_grad():
        expected = torch_logits(case.reference, tokens, mask).numpy()
    assert np.abs(expected[mask]).max() > 1
    np.testing.assert_allclose(np.asarray(logits)[mask], expected[mask], atol=1e-4)
    expected_loss, expected_grads = torch_dpo(case, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)
    # A bias of keys shifts all scores of a query alike if no rotation follows: its gradient is 0 except for rounding.
    least = 1e-3 * np.sqrt(sum(np.linalg.norm(values) ** 2 for values in expected_grads.values()))
    compared = 0
    constants = dict(case.reference.named_buffers())
    for name, values in hf_arrays(grads, case.model.config):
        if name in constants:  # tensors of the file that torch does not train
            assert not values.any(), name
            continue
        error = np.linalg.norm(values - expected_grads[name]) / max(np.linalg.norm(expected_grads[name]), least)
        assert error < 1e-4, (name, error)
        compared += 1
    assert compared == len(expected_grads)


def torch_dpo(case: Case, batch: PreferenceBatch) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the loss and its gradients by autograd, by tensor names of the files."""
    import torch

    tokens, mask = (np.asarray(x).reshape(4, LENGTH) for x in (batch.tokens, batch.attention_mask))
    logps = torch.log_softmax(torch_logits(case.reference, tokens, mask)[:, :-1], -1)
    chosen = logps.gather(-1, torch.tensor(tokens[:, 1:, None]))[..., 0]
    kept = torch.tensor(np.asarray(batch.completion_mask).reshape(4, LENGTH)[:, 1:])
    ratios = torch.where(kept, chosen, 0.0).sum(-1).reshape(2, 2) - torch.tensor(np.asarray(batch.reference_logps))
    loss = -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
    loss.backward()
    names = {"lm_head.weight": "embed_out.weight"} if case.model.config.family == "gpt_neox" else {}
    own = {names.get(name, name): p.grad for name, p in case.reference.named_parameters()}
    grads = {name: grad.numpy() for name, grad in own.items() if not is_carried(name, case.model.config)}
    return loss.item(), grads


def test_an_export_loads_in_transformers_with_equal_logits(case: Case, tmp_path: Path) -> None:
    import torch
    import transformers

    params = load_params(case.folder, case.model)
    out = tmp_path / "out"
    out.mkdir()
    saved = saved_tensors(case.folder)
    # Under the names of the folder; tensors of other parts are those of the folder.
    names = {own: name for name, own in model_names(saved, case.model.config).items()}
    tensors = {names.get(name, name): values for name, values in hf_arrays(params, case.model.config)}
    tensors |= carried(saved, case.model.config)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((case.folder / "config.json").read_bytes())
    own_class = getattr(transformers, case.reference.config.architectures[0])
    again = own_class.from_pretrained(out, attn_implementation="eager", dtype=torch.float32)
    tokens, mask = padded(case.rng, case.model.config.vocab_size, left=True)
    with torch.no_grad():
        theirs, ours = (torch_logits(model, tokens, mask).numpy() for model in (case.reference, again.eval()))
    np.testing.assert_array_equal(theirs, ours)
