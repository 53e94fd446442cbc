"""Each fusion block against its documented equation in plain matrix code, and `Guided` around any network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nuguide import checkpoint, start
from nuguide.fusion import (
    EFB,
    FUSIONS,
    GATES,
    XGFB,
    Attention,
    ChannelGate,
    Concat,
    Cross,
    FinerGuidance,
    Guided,
    at_grid,
    bands,
    build_fusion,
    feature_shapes,
    level_gates,
)
from nuguide.latents import pooled
from nuguide.networks import NETWORKS, build_network

T, G = 8, 6                      # channels of the task's features and of the guide's latent


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def block(name: str, task: int = T, guide: int = G, **options) -> nn.Module:
    """A fusion block with random weights throughout, in evaluation mode."""
    torch.manual_seed(0)
    made = build_fusion(name, task, guide, **options).eval()
    if isinstance(made, Cross):                          # its last map starts at zero
        nn.init.normal_(made.attention.out.weight)
        nn.init.normal_(made.attention.out.bias)  # pyright: ignore[reportArgumentType]
    return made


# --- the equations, one image at a time: features as matrices (channels, pixels) ---


def linear(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """W x + b of a 1x1 convolution; x (in, pixels)."""
    bias = 0 if conv.bias is None else conv.bias[:, None]
    return conv.weight[:, :, 0, 0] @ x + bias


def gates_by_hand(gate: ChannelGate, kind: str, t: Tensor, g: Tensor) -> Tensor:
    s = torch.cat([g.mean(1, keepdim=True), t.mean(1, keepdim=True)])          # [S(g); S(t)]
    e = linear(gate.squeeze, s).clamp(min=0)
    z = linear(gate.excite, e)
    return z[:T] * z[T:].sigmoid() if kind == "glu" else z.sigmoid()


def attention_by_hand(attention: Attention, q: Tensor, k: Tensor, v: Tensor, heads: int = 1) -> Tensor:
    q, k, v = linear(attention.query, q), linear(attention.key, k), linear(attention.value, v)
    d = T // heads
    rows = []
    for h in range(heads):
        one = slice(h * d, (h + 1) * d)
        weights = torch.softmax(q[one].T @ k[one] / d**0.5, dim=1)             # (queries, keys)
        rows.append(v[one] @ weights.T)
    return linear(attention.out, torch.cat(rows))


def matrices(found: Tensor) -> list[Tensor]:
    return list(found.flatten(2))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["x_gfb", "efb"])
def test_gated_blocks_compute_their_equation(name: str, gate: str) -> None:
    fusion = block(name, gate=gate)
    assert isinstance(fusion, XGFB | EFB)
    task, latent = normal(2, T, 4, 5), normal(2, G, 3, 7, seed=1)
    for t, g, found in zip(matrices(task), matrices(latent), matrices(fusion(task, latent)), strict=True):
        gated = gates_by_hand(fusion.gate, gate, t, g) * t
        keys = t if name == "x_gfb" else gated           # the one difference between the two papers
        torch.testing.assert_close(found, attention_by_hand(fusion.attention, gated, keys, keys))


def test_concat_computes_its_equation() -> None:
    fusion = block("concat")
    assert isinstance(fusion, Concat)
    fusion.norm.running_mean, fusion.norm.running_var = normal(T), normal(T).square() + 0.5
    task, latent = normal(2, T, 4, 5), normal(2, G, 4, 5, seed=1)
    for t, g, found in zip(matrices(task), matrices(latent), matrices(fusion(task, latent)), strict=True):
        mixed = linear(fusion.mix, torch.cat([t, g]))
        mean, var = fusion.norm.running_mean[:, None], fusion.norm.running_var[:, None]
        torch.testing.assert_close(found, ((mixed - mean) / (var + 1e-5).sqrt()).clamp(min=0))


@pytest.mark.parametrize("heads", [1, 4])
def test_cross_computes_its_equation(heads: int) -> None:
    fusion = block("cross", heads=heads, reach=None)
    assert isinstance(fusion, Cross)

    def n(x: Tensor) -> Tensor:                          # each token over its channels; the scale starts at 1
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    task, latent = normal(2, T, 4, 5), normal(2, G, 3, 7, seed=1)
    for t, g, found in zip(matrices(task), matrices(latent), matrices(fusion(task, latent)), strict=True):
        torch.testing.assert_close(found, t + attention_by_hand(fusion.attention, n(t), n(g), n(g), heads))


# --- what the equations mean ---


@torch.no_grad()
def test_x_gfb_attends_to_ungated_features_and_efb_to_gated_ones() -> None:
    # With every gate shut t' = 0. EFB's values are then its bias, whatever the features; X-GFB still sees them.
    x_gfb, efb = block("x_gfb"), block("efb")
    assert isinstance(x_gfb, XGFB)
    assert isinstance(efb, EFB)
    efb.load_state_dict(x_gfb.state_dict())
    for fusion in (x_gfb, efb):
        nn.init.zeros_(fusion.gate.excite.weight)
        nn.init.zeros_(fusion.gate.excite.bias)  # pyright: ignore[reportArgumentType]
    latent, one, other = normal(1, G, 4, 4), normal(1, T, 4, 4, seed=1), normal(1, T, 4, 4, seed=2)
    torch.testing.assert_close(efb(one, latent), efb(other, latent))
    assert float((x_gfb(one, latent) - x_gfb(other, latent)).abs().max()) > 0.01
    # and in either every pixel asks the same question, so gets the same answer
    assert float(x_gfb(one, latent).std(dim=(2, 3)).max()) < 1e-6


def test_cross_starts_as_the_identity() -> None:
    task = normal(2, T, 4, 5)
    assert torch.equal(Cross(T, G)(task, normal(2, G, 3, 3)), task)


@torch.no_grad()
@pytest.mark.parametrize("name", FUSIONS)
def test_the_latent_matters(name: str) -> None:
    fusion, task = block(name), normal(1, T, 4, 4)
    there, elsewhere = fusion(task, normal(1, G, 4, 4, seed=1)), fusion(task, normal(1, G, 4, 4, seed=2))
    assert float((there - elsewhere).abs().max()) > 1e-3


@pytest.mark.parametrize("gate", GATES)
def test_a_sigmoid_gate_lies_between_0_and_1_and_a_glu_gate_need_not(gate: str) -> None:
    torch.manual_seed(0)
    gates = ChannelGate(64, 64, gate)(100 * normal(4, 64, 2, 2), 100 * normal(4, 64, 2, 2, seed=1))
    assert gates.shape == (4, 64, 1, 1)
    inside = bool(((gates >= 0) & (gates <= 1)).all())
    assert inside == (gate == "sigmoid")


# --- any guide, any network ---


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("latent", [(256, 64, 64), (17, 8, 8), (3, 5, 7), (5, 1, 1)], ids=str)
def test_any_channels_and_grid_of_a_guide(name: str, latent: tuple[int, int, int]) -> None:
    task = normal(2, 32, 4, 6)
    fused = block(name, 32, latent[0])(task, normal(2, *latent, seed=1))
    assert fused.shape == task.shape
    assert fused.isfinite().all()


@pytest.mark.parametrize("name", FUSIONS)
def test_gradients_train_the_block_and_the_network_but_need_none_of_the_latent(name: str) -> None:
    fusion, task, latent = block(name).train(), normal(2, T, 4, 5).requires_grad_(), normal(2, G, 4, 4, seed=1)
    fusion(task, latent).square().sum().backward()
    assert latent.grad is None
    assert task.grad is not None
    assert task.grad.abs().sum() > 0
    for key, p in fusion.named_parameters():
        if key != "attention.key.bias":                  # adds the same to every key's score, so softmax drops it
            assert p.grad is not None, key
            assert p.grad.abs().sum() > 0, key


def test_a_latent_comes_to_the_tasks_grid_by_means_and_interpolation() -> None:
    constant = torch.full((1, 2, 64, 64), 3.0)
    assert torch.equal(at_grid(constant, 16, 16), constant[..., :16, :16])      # two poolings
    torch.testing.assert_close(at_grid(constant, 20, 24), constant[..., :20, :24])     # one, then resized
    row = torch.tensor([0.0, 1.0]).expand(1, 1, 1, 2)
    assert at_grid(row, 1, 4).flatten().tolist() == [0, 0.25, 0.75, 1]          # coarser: bilinear
    same = normal(1, 2, 5, 7)
    assert torch.equal(at_grid(same, 5, 7), same)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_guided_networks_take_odd_sizes(network: str, fusion: str) -> None:
    torch.manual_seed(0)
    net = build_network(network, 2, width=2)
    model = Guided(net, build_fusion(fusion, net.bottleneck_channels, G)).eval()
    assert model(255 * torch.rand(2, 3, 50, 70), normal(2, G, 4, 5)).shape == (2, 2, 50, 70)


def test_a_network_guided_by_a_fresh_cross_block_is_the_network() -> None:
    torch.manual_seed(0)
    net, image = build_network("eunet3plus", 2, width=2).eval(), 255 * torch.rand(1, 3, 40, 56)
    guided = Guided(net, Cross(net.bottleneck_channels, G)).eval()
    assert torch.equal(guided(image, normal(1, G, 3, 4)), net(image))


@pytest.mark.parametrize("name", FUSIONS)
def test_a_latent_pooled_for_the_cache_guides_as_the_one_it_was_made_from(name: str) -> None:
    # SAM's 64 x 64 of a 256 px tile, where the task's grid is 16 x 16
    torch.manual_seed(0)
    net = build_network("unet", 2, width=1)
    model, latent = Guided(net, block(name, 16, G)).eval(), normal(1, G, 64, 64)
    image = 255 * torch.rand(1, 3, 256, 256)
    assert pooled(latent, 16).shape == (1, G, 16, 16)
    assert torch.equal(model(image, latent), model(image, pooled(latent, 16)))


def test_guided_returns_the_list_of_a_deeply_supervised_network_in_training() -> None:
    net = build_network("unet3plus", 2, width=1, deep_supervision=True)
    model = Guided(net, Cross(16, G))
    image, latent = 255 * torch.rand(2, 3, 50, 70), normal(2, G, 4, 5)
    assert [tuple(side.shape) for side in model(image, latent)] == 5 * [(2, 2, 50, 70)]
    assert model.eval()(image, latent).shape == (2, 2, 50, 70)


def test_the_features_of_every_network_are_counted() -> None:
    each = [(3, 1), (6, 2), (12, 4), (24, 8), (48, 16)]                   # channels and stride
    assert feature_shapes(build_network("unet", 2, width=3).train()) == each
    matched = build_network("eunet3plus", 2, width=4, match_width=True)
    assert feature_shapes(matched) == each                                # round(4 / sqrt 2) = 3
    assert matched.training


def with_finer(seed: int = 0) -> tuple[Guided, Tensor, Tensor]:
    """A U-Net (strides 1, 2, 4, 8, 16) and a guide that says 5 things at stride 8 and 3 at stride 4; an input of it."""
    torch.manual_seed(seed)
    net = build_network("unet", 2, width=2)
    finer = FinerGuidance([1, 2, 4, 8, 16], [2, 4, 8, 16, 32], [(5, 2), (3, 4)])
    model = Guided(net, build_fusion("concat", 32, G), finer=finer)
    return model.eval(), 255 * torch.rand(1, 3, 64, 96), normal(1, G + 4 * 5 + 16 * 3, 4, 6)


def test_finer_features_come_out_of_a_latent_as_they_were_packed_in() -> None:
    model, _, _ = with_finer()
    assert model.finer is not None
    own, eighth, fourth = normal(2, G, 4, 6), normal(2, 5, 8, 12), normal(2, 3, 16, 24)
    pack = nn.functional.pixel_unshuffle
    rest, found = model.finer.unpacked(torch.cat([own, pack(eighth, 2), pack(fourth, 4)], dim=1))
    assert torch.equal(rest, own)
    assert [torch.equal(*pair) for pair in zip(found, (eighth, fourth), strict=True)] == [True, True]


def test_finer_features_are_concatenated_with_those_of_their_stride_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, latent = with_finer()
    seen: list[list[Tensor]] = []
    monkeypatch.setattr(model.network, "decode", lambda features: seen.append(features) or features[0])
    model(image, latent)
    plain = model.network.encode(image)
    assert model.finer is not None
    rest, (eighth, fourth) = model.finer.unpacked(latent)
    same = [torch.equal(found, before) for found, before in zip(seen[0], plain, strict=True)]
    assert same == [True, True, False, False, False]
    for level, block, guidance in ((3, 0, eighth), (2, 1, fourth)):
        torch.testing.assert_close(seen[0][level], model.finer.blocks[block](plain[level], guidance))
    torch.testing.assert_close(seen[0][4], model.fusion(plain[4], rest))


def test_a_place_of_a_finer_feature_is_heard_around_itself() -> None:
    """One value in one of the 4 x 4 places of a cell; two convolutions each at strides 4, 2 and 1 and two enlargements
    carry it 20 px."""
    model, image, latent = with_finer()
    other = latent.clone()
    other[0, -1, 1, 1] += 100                            # the last place of the cell in row 1, column 1: y, x 28 to 31
    moved = (model(image, other) - model(image, latent)).abs().amax((0, 1)).nonzero()
    assert len(moved)
    assert (moved.min(), moved.max()) == (28 - 20, 31 + 20)


@pytest.mark.parametrize(("strides", "levels"), [([1, 2, 8, 16], {0: 2}), ([1, 2, 4, 8], {1: 2}), ([1, 2], {})])
def test_finer_features_that_meet_none_of_their_stride_are_left_out(strides: list[int], levels: dict) -> None:
    finer = FinerGuidance(strides, [2, 4, 6, 8], [(5, 2), (3, 4)])       # at strides 8 and 4
    assert finer.levels == levels
    assert len(finer.blocks) == len(levels)
    assert [tuple(x.shape) for x in finer.unpacked(normal(1, 6 + 20 + 48, 2, 2))[1]] == [(1, 5, 4, 4), (1, 3, 8, 8)]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_the_default_guide(name: str) -> None:
    model = checkpoint.build(checkpoint.ModelSpec(name, {"width": 2}, "concat", guide=start.GUIDE), 976).eval()
    assert model(255 * torch.rand(1, 3, 70, 100), normal(1, 976, 5, 7)).shape == (1, 2, 70, 100)


def test_gates_at_every_level_scale_each_channel_of_the_finer_features() -> None:
    torch.manual_seed(0)
    net = build_network("unet", 2, width=2).eval()
    gates = level_gates(net, G)
    assert len(gates) == 4
    image, latent = 255 * torch.rand(1, 3, 32, 48), normal(1, G, 2, 3)
    features = net.encode(image)
    expected = [gate(t, latent) * t for gate, t in zip(gates, features, strict=False)]
    fusion = Cross(32, G)                                # which changes nothing when fresh
    assert torch.equal(Guided(net, fusion, gates=gates).eval()(image, latent), net.decode([*expected, features[-1]]))


def test_latent_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    net = build_network("unet", 2, width=2)
    model = Guided(net, block("cross", 32, G), latent_dropout=0.5)
    image, latent = 255 * torch.rand(2, 3, 32, 32), normal(2, G, 2, 2)
    model.network.eval()                                 # so that batch norm does not vary
    assert not torch.equal(model(image, latent), model(image, latent))
    model.eval()
    assert torch.equal(model(image, latent), model(image, latent))
    undropped = Guided(net, model.fusion)
    undropped.network.eval()
    assert torch.equal(undropped(image, latent), undropped(image, latent))


@torch.no_grad()
@pytest.mark.parametrize("name", FUSIONS)
def test_bf16_agrees_with_fp32_within_a_few_percent(name: str) -> None:
    fusion, task, latent = block(name, 32, 48), normal(1, 32, 4, 4), normal(1, 48, 4, 4, seed=1)
    expected = fusion(task, latent)
    with torch.autocast("cpu", torch.bfloat16):
        found = fusion(task, latent).float()
    assert float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < 0.03


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown fusion 'add'; choose from x_gfb, efb, concat, cross"):
        build_fusion("add", T, G)
    with pytest.raises(ValueError, match="unknown gate 'tanh'; choose from glu, sigmoid"):
        build_fusion("efb", T, G, gate="tanh")


# --- reach ---


def test_a_token_within_reach_1_of_a_row_of_5_sees_its_neighbors_alone() -> None:
    ((queries, keys, mask),) = bands(1, 5, 1, 5, 1, torch.device("cpu"))
    assert (queries, keys) == (slice(0, 5), slice(0, 5))
    assert mask is not None
    assert [row.nonzero().ravel().tolist() for row in mask] == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4]]
    # a latent twice as fine: cells 0..9 lie at -0.25, 0.25, 0.75 ... on the row
    ((_, _, fine),) = bands(1, 5, 1, 10, 1, torch.device("cpu"))
    assert fine is not None
    assert fine[2].nonzero().ravel().tolist() == [3, 4, 5, 6]
    ((_, _, mask),) = bands(2, 2, 4, 4, 2, torch.device("cpu"))
    assert mask is None                                                      # all see all: no mask is needed


def test_bands_of_8_rows_see_the_rows_within_reach_and_no_more() -> None:
    """20 rows of 3: bands of rows 0-7, 8-15, 16-19; with reach 2 they see rows 0-9, 6-17, 14-19."""
    found = bands(20, 3, 20, 3, 2, torch.device("cpu"))
    assert [(own.start // 3, own.stop // 3) for own, _, _ in found] == [(0, 8), (8, 16), (16, 20)]
    assert [(near.start // 3, near.stop // 3) for _, near, _ in found] == [(0, 10), (6, 18), (14, 20)]


@torch.no_grad()
@pytest.mark.parametrize("fine", [1, 2])
def test_attention_in_bands_is_attention_under_one_mask(fine: int) -> None:
    torch.manual_seed(3)
    attention = Attention(8, 8, heads=2, reach=3)
    query, key = torch.randn(2, 8, 19, 11), torch.randn(2, 8, 19 * fine, 11 * fine)
    near = []
    for side in (19, 11):
        place = (torch.arange(side * fine) + 0.5) / fine - 0.5
        near.append((torch.arange(side)[:, None] - place).abs() <= 3)
    mask = (near[0][:, None, :, None] & near[1][None, :, None, :]).reshape(19 * 11, -1)
    q, k, v = (
        conv(x).flatten(2).unflatten(1, (2, 4)).transpose(2, 3)
        for conv, x in ((attention.query, query), (attention.key, key), (attention.value, key))
    )
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(~mask, -torch.inf)      # 2: the root of 4 channels a head
    whole = attention.out((scores.softmax(-1) @ v).transpose(2, 3).flatten(1, 2).unflatten(2, (19, 11)))
    assert torch.allclose(attention(query, key, key), whole, atol=1e-6)


@torch.no_grad()
def test_what_lies_beyond_the_reach_of_cross_does_not_matter() -> None:
    task, latent = normal(1, T, 4, 12), normal(1, G, 4, 12, seed=1)
    other = latent.clone()
    other[..., 6:] = normal(1, G, 4, 6, seed=2)
    for reach, same in ((2, [True, True, False]), (None, [False, False, False])):
        fusion = block("cross", reach=reach)
        difference = (fusion(task, latent) - fusion(task, other)).abs().amax((0, 1, 2))
        assert [float(difference[column]) < 1e-6 for column in (0, 3, 4)] == same
