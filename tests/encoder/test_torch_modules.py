"""Encoders of torch's own modules: their maps, rollouts and saliency against a forward pass written out by hand."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from globenc_lightning import METHODS, attribute
from globenc_lightning.encoder.layers import POST_LN, PRE_LN
from globenc_lightning.errors import GlobEncWarning, UnsupportedEncoderError
from tests import naive
from tests.torch_models import CLASSES, HEADS, VOCABULARY, WIDTH, Block, Blocks, Classifier, by_hand, drawn, texts


def assert_by_hand(model: Any, ids: Tensor, rule: str, **inputs: Tensor) -> None:
    """Everything that is attributed is what the forward pass by hand gives."""
    expected = by_hand(model, ids)
    found = attribute(model, {"input_ids": ids, **inputs}, methods=METHODS, readout="mean")
    seen = torch.ones_like(ids).bool() if getattr(model, "padded", True) is False else ids != 0
    assert found.rule == rule
    assert torch.equal(found.attention_mask, seen)
    assert found.input_ids is not None
    assert torch.equal(found.input_ids, ids)
    assert len(expected.maps) == found.local["N-Enc"].shape[1] == len(found.reconstruction_error)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.saliency.double(), expected.saliency, rtol=1e-7, atol=1e-9)
    for method in METHODS:
        local = torch.stack([maps[method] for maps in expected.maps], 1)
        torch.testing.assert_close(found.local[method], local, rtol=1e-7, atol=1e-9)
        raw = found.rollout[method] * found.log_scale[method].exp()[..., None, None]
        torch.testing.assert_close(raw, naive.rollout(local), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("final", [False, True], ids=["", "final norm"])
@pytest.mark.parametrize("norm_first", [False, True], ids=[POST_LN, PRE_LN])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_transformer_encoder(batch_first: bool, norm_first: bool, final: bool) -> None:
    model = drawn(Classifier(batch_first=batch_first, norm_first=norm_first, final=final))
    assert_by_hand(model, texts(), PRE_LN if norm_first else POST_LN)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"bias": False}, {"layer_norm_eps": 0.1}], ids=str)
def test_options_of_its_layers(options: dict[str, Any], batch_first: bool) -> None:
    assert_by_hand(drawn(Classifier(batch_first=batch_first, **options)), texts(), POST_LN)


def causal(size: int) -> Tensor:
    return torch.ones(size, size).triu(1).bool()


def distances(size: int) -> Tensor:
    places = torch.arange(size, dtype=torch.float64)
    return -(places - places.unsqueeze(1)).abs() / 3


def distances_by_head(size: int) -> Tensor:
    return torch.cat([distances(size).unsqueeze(0) * scale for scale in (0.0, 0.5, 1.0, 2.0)]).repeat(4, 1, 1)


@pytest.mark.parametrize("padded", [True, False], ids=["padding told", "padding not told"])
@pytest.mark.parametrize("mask", [causal, distances, distances_by_head], ids=["bool", "float", "float by head"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_attention_masks(mask: Callable[[int], Tensor], batch_first: bool, padded: bool) -> None:
    # A mask for each head is of as many examples as there are in the batch.
    model = drawn(Classifier(mask=mask, padded=padded, batch_first=batch_first))
    assert_by_hand(model, texts(), POST_LN) if mask is not distances_by_head else by_head(model)


def by_head(model: Any) -> None:
    """The structure is found with two of the four examples."""
    own = model.mask
    model.mask = lambda size: own(size)
    encoded = model.encoded

    def forward(input_ids: Tensor) -> Tensor:
        model.mask = lambda size: own(size)[: HEADS * len(input_ids)]
        return model.head(encoded(input_ids)[:, 0])

    model.forward = forward
    ids = texts()
    forward(ids)
    assert_by_hand(model, ids, POST_LN)


ASKED = {"averaged": (True, True), "by head": (True, False), "no weights": (False, False)}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("pre", [False, True], ids=[POST_LN, PRE_LN])
def test_blocks_around_multihead_attention(pre: bool, asked: str) -> None:
    assert_by_hand(drawn(Blocks(pre=pre, asked=ASKED[asked])), texts(), PRE_LN if pre else POST_LN)


@pytest.mark.parametrize("final", [False, True], ids=["", "final norm"])
@pytest.mark.parametrize("pre", [False, True], ids=[POST_LN, PRE_LN])
@pytest.mark.parametrize("turns", [False, True], ids=["whole", "around the attention"])
def test_blocks_with_the_sequence_first(turns: bool, pre: bool, final: bool) -> None:
    model = drawn(Blocks(pre=pre, final=final, first=False, turns=turns, sequence_first=not turns))
    assert_by_hand(model, texts(), PRE_LN if pre else POST_LN)


def test_as_many_examples_as_tokens() -> None:
    # Nothing in the shapes tells the axes apart, so that the ids that have no name cannot be told.
    model = drawn(Classifier(batch_first=False))
    ids = texts((4, 3, 2, 4))
    expected = by_hand(model, ids)
    found = attribute(model, {"input_ids": ids}, methods=["N-Enc"])
    torch.testing.assert_close(
        found.local["N-Enc"], torch.stack([maps["N-Enc"] for maps in expected.maps], 1), rtol=1e-7, atol=1e-9
    )
    assert found.input_ids is None


@pytest.mark.parametrize("order", ["tokens first", "tokens last"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_ids_are_those_of_tokens(batch_first: bool, order: str) -> None:
    class WithTables(Classifier):
        def __init__(self) -> None:
            super().__init__(batch_first=batch_first)
            # More places than words.
            self.places, self.segments = nn.Embedding(512, WIDTH), nn.Embedding(2, WIDTH)

        def embedded(self, ids: Tensor) -> Tensor:
            places = torch.arange(ids.shape[1]).expand_as(ids)
            tables = [(self.embed, ids), (self.places, places), (self.segments, (ids > 20).long())]
            parts = [table(given) for table, given in (tables if order == "tokens first" else tables[::-1])]
            return torch.stack(parts).sum(0)

    ids = texts()
    found = attribute(drawn(WithTables()), {"input_ids": ids})
    assert found.input_ids is not None
    assert torch.equal(found.input_ids, ids)


def test_ids_of_two_texts_that_are_looked_up_before_both_are_read_are_not_guessed() -> None:
    class Two(Classifier):
        def forward(self, input_ids: Tensor, other_input_ids: Tensor) -> Tensor:
            first, second = self.embedded(input_ids), self.embedded(other_input_ids)
            logits: Tensor = self.head(self.encoder(second)[:, 0] - self.encoder(first)[:, 0])
            return logits

    found = attribute(
        drawn(Two(batch_first=True)), {"input_ids": texts((6, 6)), "other_input_ids": texts((6, 6), seed=1)}
    )
    assert found.input_ids is None


def test_a_sentence_alone_and_among_others() -> None:
    model, ids = drawn(Classifier(batch_first=True, norm_first=True)), texts()
    together = attribute(model, {"input_ids": ids})
    alone = attribute(model, {"input_ids": ids[1:2, :5]})
    torch.testing.assert_close(together.rows["N-Enc"][1:2, :, :5], alone.rows["N-Enc"], rtol=1e-7, atol=1e-9)
    assert not together.local["N-Enc"][1, :, 5:].any()
    assert not together.local["N-Enc"][1, :, :, 5:].any()


class Kernels(TorchDispatchMode):
    """Notes the names of the operators that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


FUSED = {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"}


WITH_FUSED: dict[str, Callable[[], Any]] = {
    "layer": lambda: Classifier(batch_first=True),
    "nested tensors": lambda: Classifier(batch_first=True, nested=True),
    "attention": lambda: Blocks(pre=True),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", WITH_FUSED)
def test_the_fused_kernels_are_left_out_and_give_the_same(name: str) -> None:
    model, ids = drawn(WITH_FUSED[name]()).float(), texts()

    def evaluated() -> tuple[Tensor, set[str]]:
        with torch.no_grad(), Kernels() as kernels:
            return model(ids), kernels.names

    before, fused = evaluated()
    assert FUSED & fused
    with Kernels() as kernels:
        found = attribute(model, {"input_ids": ids})
    assert not FUSED & kernels.names
    torch.testing.assert_close(found.logits, before, rtol=1e-4, atol=1e-4)
    after, still = evaluated()
    assert torch.equal(before, after)
    assert still == fused


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_head_that_reads_padding_which_evaluation_sets_to_zero() -> None:
    class Mean(Classifier):
        def forward(self, input_ids: Tensor) -> Tensor:
            logits: Tensor = self.head(self.encoded(input_ids).mean(1))
            return logits

    ids, nested, plain = texts(), drawn(Mean(batch_first=True, nested=True)), drawn(Mean(batch_first=True))
    with torch.no_grad():
        evaluated = nested(ids)
    with pytest.warns(GlobEncWarning, match="reads padding"):
        found = attribute(nested, {"input_ids": ids})
    assert not torch.allclose(found.logits, evaluated)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GlobEncWarning)
        same = attribute(plain, {"input_ids": ids})
        attribute(drawn(Classifier(batch_first=True, nested=True)), {"input_ids": ids})
    assert torch.equal(found.logits, same.logits)
    assert torch.equal(found.saliency, same.saliency)


def test_the_model_stays_what_it_was() -> None:
    model, ids = drawn(Classifier(batch_first=False)), texts()
    model.train()
    model.encoder.layers[1].eval()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: dict(vars(one)) for name, one in model.named_modules()}
    attribute(model, {"input_ids": ids})
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    for name, one in model.named_modules():
        assert vars(one) == attributes[name]
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


# ---- other places of the attention


class Layers(nn.Module):
    """Lists of parts for each layer, as one module whose forward joins them."""

    def __init__(self) -> None:
        super().__init__()
        parts = [
            [nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.LayerNorm(WIDTH)]
            for _ in range(2)
        ]
        self.layers = nn.ModuleList([nn.ModuleList([*part, nn.Linear(WIDTH, WIDTH)]) for part in parts])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for norm1, attention, norm2, feed in self.layers:
            y = norm1(x)
            x = x + attention(y, y, y)[0]
            x = x + feed(norm2(x))
        return self.norm(x)


class Called(nn.Module):
    """A body between embeddings and a head."""

    def __init__(self, body: nn.Module, *inputs: Any) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(VOCABULARY, WIDTH), body, nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = self.body(x, input_ids == 0) if isinstance(self.body, Block) else self.body(x)
        return self.head(x[:, 0] if isinstance(x, Tensor) else x[0][:, 0])


def layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, **options)


BODIES: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "lists of parts": (Layers, PRE_LN, 2),
    "nn.Sequential": (lambda: nn.Sequential(layer(), layer()), POST_LN, 2),
    "nn.Sequential with a norm": (lambda: nn.Sequential(layer(norm_first=True), nn.LayerNorm(WIDTH)), PRE_LN, 1),
    "one block": (lambda: Block(True), PRE_LN, 1),
    "one layer": (layer, POST_LN, 1),
}


@pytest.mark.parametrize("body", BODIES)
def test_where_the_attention_stands(body: str) -> None:
    make, rule, depth = BODIES[body]
    found = attribute(drawn(Called(make())), {"input_ids": texts((6, 6, 6))}, methods=METHODS)
    assert (found.rule, found.encoder, len(found.reconstruction_error)) == (rule, "body", depth)
    assert float(found.reconstruction_error.max()) < 1e-9


def test_an_encoder_called_twice() -> None:
    class Twice(Classifier):
        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.encoded(input_ids)[:, 0] * self.encoded(input_ids.flip(0))[:, 0])

    model = drawn(Twice(batch_first=False, norm_first=True, final=True))
    ids = texts((7, 5, 7))
    found = attribute(model, {"input_ids": ids}, methods=["N-Enc"])
    assert len(found.others) == 1
    once = attribute(drawn(Classifier(batch_first=False, norm_first=True, final=True)), {"input_ids": ids})
    torch.testing.assert_close(found.local["N-Enc"], once.local["N-Enc"])
    torch.testing.assert_close(found.others[0].local["N-Enc"], once.local["N-Enc"].flip(0))


# ---- what is refused


class Crossing(nn.Module):
    """A block whose attention is given another sequence."""

    def __init__(self, tokens: int | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.norm1, self.norm2, self.feed = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tokens = tokens
        self.other = nn.Parameter(torch.empty(1, 6 if tokens is None else tokens, self.attention.kdim))

    def forward(self, x: Tensor) -> Tensor:
        other = self.other.expand(len(x), -1, -1)
        own = self.tokens is None and self.attention.kdim == WIDTH
        x = self.norm1(x + (self.attention(x, x, x) if own else self.attention(x, other, other))[0])
        return self.norm2(x + self.feed(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        one = nn.TransformerDecoderLayer(WIDTH, HEADS, 24, batch_first=True)
        self.decoder = nn.TransformerDecoder(one, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(x, x)
        return out


class Alone(nn.Module):
    """An attention with nothing around it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another sequence": (lambda: Crossing(9), "6 tokens attend to 9 of another sequence"),
    "another of the same length": (lambda: Crossing(6), "the values cannot be followed back to the layer's hidden"),
    "keys of another width": (lambda: Crossing(kdim=8, vdim=8), "of another width than its queries"),
    "a learned key": (lambda: Crossing(add_bias_kv=True), "add_bias_kv"),
    "a key of zeros": (lambda: Crossing(add_zero_attn=True), "add_zero_attn"),
    "a decoder": (Decoder, "attends to another sequence beside its own"),
    "nothing around it": (Alone, "no norm takes the output.*nn.ModuleList"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(UnsupportedEncoderError, match=reason):
        attribute(drawn(Called(make())), {"input_ids": texts((6, 6, 6))})


def test_some_of_the_blocks_are_not_called() -> None:
    class Fewer(Blocks):
        def encoded(self, ids: Tensor) -> Tensor:
            return self.blocks[0](self.embedded(ids), ids == 0)

    with pytest.raises(UnsupportedEncoderError, match="calls 1 of its 2 blocks"):
        attribute(drawn(Fewer(pre=False)), {"input_ids": texts()})


def test_blocks_that_are_run_twice_before_their_norm() -> None:
    class Again(Blocks):
        def encoded(self, ids: Tensor) -> Tensor:
            x = self.embedded(ids)
            for block in (*self.blocks, *self.blocks):
                x = block(x, ids == 0)
            return self.norm(x)

    class Listed(Blocks):
        """The same, with each block in the list as often as it is called."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.blocks = nn.ModuleList([*self.blocks, *self.blocks])

    ids = {"input_ids": texts()}
    with pytest.raises(UnsupportedEncoderError, match="blocks: a forward pass runs through its layers 2 times"):
        attribute(drawn(Again(pre=True)), ids)
    assert attribute(drawn(Listed(pre=True)), ids).rows["N-Enc"].shape[1] == 4


def test_a_wrong_projection_is_caught() -> None:
    class Wrong(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return out.flip(-1), weights

    model = Blocks(pre=False)
    for block in model.blocks:
        block.attention = Wrong(WIDTH, HEADS, batch_first=True)
    with pytest.raises(UnsupportedEncoderError):
        attribute(drawn(model), {"input_ids": texts()})
