import itertools
import sys

import numpy as np
import pytest
import torch
from compare import assert_as_good_as, assert_close
from recorded import golden, golden_cases

import disa_fast
from disa_fast import models
from disa_fast.demo.captions import VOCABULARY, caption, every_prompt, make_tokenizer
from disa_fast.errors import UnsupportedError
from disa_fast.models.harmon import SIZES, LanguageModel
from disa_fast.models.prompts import GENERIC_PROMPT, encode_prompts, image_prompt, instruction
from disa_fast.schedule import Linear

pytestmark = pytest.mark.usefixtures("one_thread")


def recorded_model(recorded, dtype):
    model = models.harmon(class_num=2, **{name: value for name, value in recorded.meta["model"].items() if name != "norm_eps"})
    model.load_state_dict(recorded.state_dict())
    return model.to(dtype).eval()


def recorded_call(recorded, case):
    """(arguments, draws) of a recorded call; what has to be drawn is left in `draws`."""
    name = f"case/{case['name']}"
    draws = iter(
        [d for s in range(case["num_iter"]) for d in (recorded[f"{name}/s{s}/init_noise"], *recorded[f"{name}/s{s}/step_noise"])]
    )

    def draw(shape, dtype):
        drawn = next(draws)
        assert drawn.shape == shape
        assert dtype != torch.bfloat16
        return drawn.to(dtype)

    input_ids = recorded[f"{name}/input_ids"]
    arguments = {
        "input_ids": input_ids,
        "attention_mask": torch.arange(input_ids.shape[1]) < recorded[f"{name}/lens"][:, None],
        "schedule": Linear(case["upper"], case["lower"]),
        "orders": recorded[f"{name}/orders"],
        "draw": draw,
        **{key: case[key] for key in ("num_iter", "cfg", "cfg_schedule", "temperature", "image_shape")},
    }
    return arguments, draws


BACKENDS = ["reference", "hoisted", pytest.param("cpu", marks=pytest.mark.native)]


@pytest.mark.parametrize(("which", "stem", "case"), golden_cases("harmon_e2e"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_images_as_recorded(which, stem, case, backend):
    """float32 within rounding; bfloat16 as near as the recording to what the rounded weights give in float64."""
    recorded, dtype = golden(which, stem), getattr(torch, case["dtype"])
    arguments, draws = recorded_call(recorded, case)
    model = recorded_model(recorded, dtype)
    pred = model.sample(**arguments, backend=backend)
    assert next(draws, None) is None
    assert pred.dtype == dtype
    expected = recorded[f"case/{case['name']}/pred"]
    if dtype == torch.float32:
        assert_close(pred, expected, worst=5e-6 * float(expected.abs().max()))
    else:
        truth = model.double().sample(**recorded_call(recorded, case)[0], backend="reference")
        assert_as_good_as(pred, expected, truth, torch.bfloat16)


# Structure ------------------------------------------------------------------------------------------------------------

SMALL = {
    "img_size": 64,
    "buffer_size": 4,
    "class_num": 1,
    "diffloss_d": 1,
    "diffloss_w": 32,
    "llm": {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2},
    **{f"{part}_{name}": value for part, dim in (("encoder", 32), ("decoder", 48))
       for name, value in (("embed_dim", dim), ("depth", 1), ("num_heads", 2))},
}  # fmt: skip
QUICK = {"schedule": "linear:4-2", "num_iter": 4}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = models.harmon(**SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.tokenizer = make_tokenizer(every_prompt())
    return model.eval()


def drawn(model, *args, seed=3, **kwargs):
    return model.sample_tokens(*args, generator=torch.Generator().manual_seed(seed), **QUICK | kwargs)


def test_state_dict_is_the_published_one(model):
    recorded = golden("slim", "harmon_e2e")
    names = set(recorded_model(recorded, torch.float32).state_dict())
    assert names == set(recorded.state_dict())


def test_what_published_files_may_hold_besides(model):
    state = model.state_dict()
    besides = {"llm.lm_head.weight": torch.zeros(3, 3), "vae.decoder.conv_in.weight": torch.zeros(1)}
    other = models.harmon(**SMALL)
    other.load_state_dict(state | besides)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True))
    assert "llm.lm_head.weight" in state | besides
    with pytest.raises(RuntimeError, match=r"llm\.lm_tail"):
        other.load_state_dict(state | {"llm.lm_tail.weight": torch.zeros(1)})


def test_sizes():
    with torch.device("meta"):
        small, large = models.harmon("0.5b"), models.harmon("1.5b")
    assert (small.head.spec.width, small.head.spec.depth, small.head.spec.z_channels) == (1024, 6, 768)
    assert (large.head.spec.width, large.head.spec.depth, large.head.spec.z_channels) == (1536, 12, 1280)
    assert sum(p.numel() for p in small.llm.parameters()) == 494_032_768  # Qwen2.5-0.5B
    assert sum(p.numel() for p in large.llm.parameters()) == 1_543_714_304
    for model, base in ((small, 1e6), (large, 1e6)):
        rotary = model.llm.model.rotary_emb.inv_freq
        expected = base ** (-torch.arange(0, 2 * len(rotary), 2, dtype=torch.float64) / (2 * len(rotary)))
        assert_close(rotary, expected, worst=1e-6)
    assert [size["llm"]["hidden_size"] // size["llm"]["num_attention_heads"] for size in SIZES.values()] == [64, 128]
    with pytest.raises(ValueError, match=r"size: expected one of \['0.5b', '1.5b'\], got '7b'"):
        models.harmon("7b")


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"Harmon needs transformers: pip install 'disa-fast\[harmon\]'"):
        LanguageModel(SMALL["llm"])


def test_it_needs_no_acceleration(model, capsys):
    with pytest.raises(UnsupportedError, match="already fast"):
        disa_fast.accelerate(model)
    assert disa_fast.explain(model)["backend"] in ("hoisted", "cpu")


# Prompts --------------------------------------------------------------------------------------------------------------


def test_prompts_are_put_as_in_training(model):
    texts = [instruction(text) for text in (image_prompt("a bag"), GENERIC_PROMPT)]
    ids, mask = encode_prompts(model.tokenizer, texts)
    assert model.tokenizer.decode(ids[0].tolist(), skip_special_tokens=False) == (
        "<|im_start|>user\nGenerate an image: a bag<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.dtype == torch.int64
    assert mask.sum(dim=1).tolist() == [len(model.tokenizer.encode(text).ids) for text in texts]
    for text in (*every_prompt(), "ein Stück Käse, \N{PILE OF POO}"):
        assert model.tokenizer.decode(model.tokenizer.encode(text).ids, skip_special_tokens=False) == text
    with pytest.raises(ValueError, match="prompt: expected texts that have tokens"):
        encode_prompts(model.tokenizer, ["a bag", ""])


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_prompts_are_their_tokens(model, cfg):
    prompts = ["a photo of a dark dress", "a bag"]
    texts = [instruction(image_prompt(text)) for text in prompts] + [instruction(GENERIC_PROMPT)] * (2 if cfg != 1 else 0)
    input_ids, mask = encode_prompts(model.tokenizer, texts)
    tokens = drawn(model, prompts, cfg=cfg)
    assert tokens.shape == (2, 16, 4, 4)
    assert torch.equal(tokens, drawn(model, input_ids=input_ids, attention_mask=mask, cfg=cfg))
    assert not torch.allclose(tokens, drawn(model, ["a photo of a dark dress", "a coat"], cfg=cfg))
    assert torch.equal(drawn(model, "a bag", cfg=cfg), drawn(model, ["a bag"], cfg=cfg))


def test_the_generic_prompt_is_led_away_from(model):
    assert torch.equal(drawn(model, "a bag"), drawn(model, "a bag", cfg_prompt="Generate an image."))
    assert not torch.allclose(drawn(model, "a bag"), drawn(model, "a bag", cfg_prompt="a coat"))
    assert torch.equal(drawn(model, "a bag", cfg=1.0), drawn(model, "a bag", cfg=1.0, cfg_prompt="a coat"))


def test_padding_changes_nothing(model):
    """Neither how long the others' prompts are, nor what the padding holds."""
    texts = [instruction(image_prompt(caption(label))) for label in (1, 8)]
    input_ids, mask = encode_prompts(model.tokenizer, texts)
    assert not mask.all()
    orders = torch.stack([torch.randperm(16) for _ in range(2)])
    noise = {}

    def draws(rows):
        """Noise of the images `rows` alone, of that which both draw."""
        count = itertools.count()

        def draw(shape, dtype):
            whole = noise.setdefault(next(count), torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(len(noise))))
            return whole[rows, : shape[0] // len(rows)].flatten(0, 1).to(dtype)

        return draw

    def run(rows, ids, mask):
        return model.sample_tokens(input_ids=ids, attention_mask=mask, orders=orders[rows], draw=draws(rows), cfg=1.0, **QUICK)

    both = run([0, 1], input_ids, mask)
    for row in (0, 1):
        length = int(mask[row].sum())
        alone = run([row], input_ids[[row], :length], mask[[row], :length])
        assert_close(alone[0], both[row], worst=1e-5 * float(both.abs().max()))
    assert_close(run([0, 1], torch.where(mask, input_ids, 7), mask), both, worst=1e-6 * float(both.abs().max()))


def test_the_cache_is_curtailed_to_the_prompt(model, monkeypatch):
    input_ids, seen = encode_prompts(model.tokenizer, [instruction(image_prompt("a bag"))])[0], []
    forward = model.llm.model.forward

    def watched(*args, **kwargs):
        cache = kwargs.get("past_key_values")
        seen.append((None if cache is None else cache.get_seq_length(), kwargs.get("position_ids")))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.llm.model, "forward", watched)
    drawn(model, input_ids=input_ids, cfg=1.0)
    length = input_ids.shape[1]
    assert [cached for cached, _ in seen] == [None, *[length] * QUICK["num_iter"]]
    assert all(int(positions[0, 0]) == length for _, positions in seen[1:])
    assert [positions.shape[1] for _, positions in seen[1:]] == [4 + known for known in (0, 2, 5, 10)]


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_shape", [(4, 4), (2, 3), (8, 8), (1, 20)])
def test_any_shape(model, image_shape):
    tokens = drawn(model, "a bag", image_shape=image_shape)
    assert tokens.shape == (1, 16, *image_shape)
    assert tokens.isfinite().all()
    assert torch.equal(tokens, drawn(model, "a bag")) == (image_shape == (4, 4))


def test_positions_are_interpolated(model):
    mar = model.mar
    learned = mar.encoder_pos_embed_learned.detach()
    assert mar.positions(learned, (4, 4)) is learned
    assert mar.positions(learned, None) is learned
    twice = mar.positions(learned, (8, 4))
    assert torch.equal(twice[:, :4], learned[:, :4])
    rows = twice[0, 4:].unflatten(0, (8, 4))
    old = learned[0, 4:].unflatten(0, (4, 4))
    assert_close(rows[1], 0.75 * old[0] + 0.25 * old[1], worst=1e-6)
    assert_close(rows[0], old[0], worst=1e-6)


def test_orders_with_and_without_the_unconditional_half(model):
    orders = torch.stack([torch.randperm(16) for _ in range(2)])
    both = torch.cat([orders, orders.flip(0)])
    assert torch.equal(drawn(model, ["a bag", "a coat"], orders=orders), drawn(model, ["a bag", "a coat"], orders=both))
    with pytest.raises(ValueError, match=r"orders: expected \[4, 16\]|orders: expected \[2, 16\]"):
        drawn(model, ["a bag", "a coat"], orders=orders[:1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cfg_schedule", ["constant", "linear"])
def test_backends_agree(model, backend, cfg_schedule):
    tokens, reference = (
        drawn(model, "a bag", cfg_schedule=cfg_schedule, backend=name) for name in (backend, "reference")
    )  # fmt: skip
    assert_close(tokens, reference, worst=1e-4 * float(reference.abs().max()))


def test_images_by_a_vae(model):
    class Twice:
        def decode(self, latents):
            return 2 * latents

    latents = drawn(model, "a bag")
    generator = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    assert torch.equal(model.sample("a bag", generator=generator(), **QUICK), latents / 0.2325)
    assert torch.equal(model.sample("a bag", generator=generator(), vae=Twice(), **QUICK), 2 * (latents / 0.2325))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt, input_ids: expected one of them, got none"),
        (
            {"prompt": "a bag", "input_ids": torch.ones(2, 3, dtype=torch.int64)},
            "prompt, input_ids: expected one of them, got both",
        ),
        ({"prompt": []}, "prompt: expected texts that have tokens"),
        ({"input_ids": torch.ones(2, 3)}, r"input_ids: expected a \[rows, L\] tensor of whole numbers"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"input_ids: expected a \[rows, L\] tensor of whole numbers"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.int64)}, "input_ids: expected tokens 0..383"),
        ({"input_ids": torch.full((2, 3), 384)}, "input_ids: expected tokens 0..383"),
        ({"input_ids": torch.full((2, 3), -1)}, "input_ids: expected tokens 0..383"),
        ({"input_ids": torch.ones(3, 3, dtype=torch.int64)}, "input_ids: guidance expects an even number of rows"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64, device="meta")}, "input_ids: expected it on cpu"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 4)},
            r"attention_mask: expected \[2, 3\], as input_ids",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
            "attention_mask: expected rows that begin with their prompt and are padded on the right",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])},
            "attention_mask: expected rows that begin with their prompt and are padded on the right",
        ),
        ({"prompt": "a bag", "image_shape": (4, 0)}, "image_shape: expected"),
        ({"prompt": "a bag", "image_shape": 16}, "image_shape: expected"),
        ({"prompt": "a bag", "image_shape": (2, 2.0)}, "image_shape: expected"),
        ({"prompt": "a bag", "num_iter": 17}, "num_iter: expected 1 to 16 iterations"),
        ({"prompt": "a bag", "num_iter": 7, "image_shape": (2, 3)}, "num_iter: expected 1 to 6 iterations"),
        ({"prompt": "a bag", "cfg_schedule": "cosine"}, r"cfg_schedule: expected one of \['linear', 'constant'\], got 'cosine'"),
    ],
)
def test_errors(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.sample_tokens(**QUICK | arguments)


def test_no_tokenizer(model):
    with pytest.raises(ValueError, match=r"prompt: there is no tokenizer to read it with; set model\.tokenizer, or pass input_ids"):
        models.harmon(**SMALL).sample_tokens("a bag")


# Training -------------------------------------------------------------------------------------------------------------


def loss_of(model, input_ids, mask):
    torch.manual_seed(0)
    return model(torch.randn(4, 16, 4, 4), input_ids, mask)


def test_training_hears_the_prompt(model):
    texts = ["a dark bag", "a bag", "a photo of a pair of trousers", "a coat"]
    input_ids, mask = encode_prompts(model.tokenizer, [instruction(image_prompt(text)) for text in texts])
    loss = loss_of(model, input_ids, mask)
    assert torch.equal(loss, loss_of(model, torch.where(mask, input_ids, 7), mask))  # what pads is not heard
    other = input_ids.clone()
    other[0, -6:] = input_ids[1, -6:]
    assert abs(float((loss - loss_of(model, other, mask)).detach())) > 1e-5 * float(loss.detach())

    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = dict(zip(parameters, gradients, strict=True))
    assert [name for name, gradient in gradients.items() if gradient is None] == ["mar.class_emb.weight"]
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values() if gradient is not None)
    heard = gradients["llm.model.embed_tokens.weight"].abs().sum(dim=1).nonzero()[:, 0]
    assert heard.tolist() == sorted(set(input_ids[mask].tolist()))


def test_training_lowers_the_loss(model):
    learner = models.harmon(**SMALL).train()
    input_ids, mask = encode_prompts(model.tokenizer, [instruction(image_prompt("a bag"))] * 4)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=4e-3)
    losses = []
    for _ in range(40):
        loss = loss_of(learner, input_ids, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
