"""The guides: SAM's encoder equals a trusted implementation, EfficientNet-Lite0 knows a cat, and both stay frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import skimage.data
import torch
from torch import Tensor, nn

from nuguide import guides
from nuguide.guides import GUIDES, FrozenGuide, dinov2, load_guide, mobilesam, sam
from nuguide.guides.fitting import MEAN
from nuguide.networks import fold_batch_norm
from nuguide.types import Sample, UserError

EFFICIENTNETS = ["efficientnet_lite0", "efficientnet_lite0_pyramid"]      # whose weights are always there
SMALL_PX = {"dinov2_small": 224, "mobile_sam": 256}                     # to be quick
CATS = {281: "tabby", 282: "tiger cat", 285: "Egyptian cat"}


def tiny_sam(image_px: int | None = None) -> sam.SamGuide:
    """Two narrow blocks, the second one global; a grid of 4 x 4 at its native 64 px."""
    return sam.SamGuide(depth=2, width=32, heads=2, global_blocks=(1,), image_px=image_px or 64)


def filled(guide: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every parameter, position tables included, so no part of a comparison is idle."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in guide.parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
    return guide.eval().requires_grad_(False)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a guide in `GUIDES` that is the tiny SAM, for 64 and 32 px."""
    spec = replace(GUIDES["sam_vit_b"], name="tiny", build=tiny_sam, image_px=(64, 32), filename="tiny.pth", url=None)
    monkeypatch.setitem(GUIDES, "tiny", spec)
    return "tiny"


@pytest.fixture
def image(tissue: Sample) -> Tensor:
    """Drawn tissue, (1, 3, 256, 256) float, 0..255."""
    return torch.from_numpy(tissue.image_rgb).permute(2, 0, 1)[None].float()


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


# SAM against the transformers library ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")


Reference = Callable[..., nn.Module]


@pytest.fixture
def reference(transformers: ModuleType) -> Reference:
    """Makes the library's encoder with random weights.

    Its own initialization (deviation 1e-10, position tables of zeros) makes the output a constant, which any encoder
    with the same last layer would equal; here all of it matters.
    """

    def make(image_px: int, **shape: object) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.SamVisionConfig(image_size=image_px, initializer_range=0.02, **shape)
        model = transformers.SamVisionModel(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")) or "norm" in name or "bias" in name:
                nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
        return model.eval().requires_grad_(False)

    return make


def as_the_library_wants_it(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    return (image - mean) / std


def test_sam_equals_the_reference_at_1024_px(reference: Reference):
    theirs = reference(1024, num_hidden_layers=2, global_attn_indexes=[1])     # true width; windows, then all tokens
    ours = sam.SamGuide(depth=2, width=768, heads=12, global_blocks=(1,)).eval().requires_grad_(False)
    ours.load_state_dict(ours.adapted(theirs.state_dict()), strict=True)
    image = 255 * torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    expected = theirs(as_the_library_wants_it(image)).last_hidden_state
    latent = ours(image)
    assert latent.shape == (1, 256, 64, 64)
    assert expected.std(dim=(2, 3)).mean() > 0.05                              # it depends on the place
    assert largest_difference(latent, expected) < 1e-4


def test_the_whole_of_sam_vit_b_equals_the_reference_and_bfloat16_comes_close(reference: Reference, image: Tensor):
    theirs = reference(256)
    ours = sam.sam_vit_b(256).eval().requires_grad_(False)
    ours.load_state_dict(ours.adapted(theirs.state_dict()), strict=True)
    expected = theirs(as_the_library_wants_it(image)).last_hidden_state
    assert largest_difference(ours(image), expected) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(ours(image), expected) < 0.03
    assert relative_error(ours.to(torch.bfloat16)(image), expected) < 0.03


def official_shapes(depth: int, width: int, head: int, global_blocks: set[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the official checkpoints, written down from their documentation."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 64, 64, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "neck.0.weight": (256, width, 1, 1),
        "neck.1.weight": (256,),
        "neck.1.bias": (256,),
        "neck.2.weight": (256, 256, 3, 3),
        "neck.3.weight": (256,),
        "neck.3.bias": (256,),
    }
    for index in range(depth):
        distances = 2 * (64 if index in global_blocks else 14) - 1
        block = {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.rel_pos_h": (distances, head),
            "attn.rel_pos_w": (distances, head),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "mlp.lin1.weight": (4 * width, width),
            "mlp.lin1.bias": (4 * width,),
            "mlp.lin2.weight": (width, 4 * width),
            "mlp.lin2.bias": (width,),
        }
        shapes.update({f"blocks.{index}.{name}": shape for name, shape in block.items()})
    return {f"image_encoder.{name}": shape for name, shape in shapes.items()}


SIZES = {
    "sam_vit_b": (12, 768, 12, (2, 5, 8, 11), 89_670_912),
    "sam_vit_l": (24, 1024, 16, (5, 11, 17, 23), 308_278_272),
    "sam_vit_h": (32, 1280, 16, (7, 15, 23, 31), 637_026_048),
}


@pytest.mark.parametrize("name", SIZES)
def test_each_size_has_the_tensors_of_the_official_file(name: str):
    depth, width, heads, global_blocks, parameters = SIZES[name]
    shapes = official_shapes(depth, width, width // heads, set(global_blocks))
    with torch.device("meta"):                                                 # nothing is allocated
        ours = GUIDES[name].build(None)
        file = {key: torch.empty(shape) for key, shape in shapes.items()}
    assert isinstance(ours, sam.SamGuide)
    file |= {"prompt_encoder.x": torch.empty(0), "mask_decoder.y": torch.empty(0)}
    ours.load_state_dict(ours.adapted(file), strict=True, assign=True)
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    assert len(shapes) == {"sam_vit_b": 177, "sam_vit_l": 345, "sam_vit_h": 457}[name]


@pytest.mark.parametrize("name", SIZES)
def test_each_size_has_the_tensors_of_the_hugging_face_file(name: str, transformers: ModuleType):
    depth, width, heads, global_blocks, _ = SIZES[name]
    shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    config = transformers.SamVisionConfig(global_attn_indexes=list(global_blocks), **shape)
    with torch.device("meta"):
        ours, theirs = GUIDES[name].build(None), transformers.SamVisionModel(config)
    assert isinstance(ours, sam.SamGuide)
    file = theirs.state_dict() | {"mask_decoder.y": torch.empty(0)}
    ours.load_state_dict(ours.adapted(file), strict=True, assign=True)


# DINOv2 against the transformers library ------------------------------------------------------------------------------


@pytest.fixture
def dinov2_reference(transformers: ModuleType) -> Reference:
    """Makes the library's DINOv2 with random weights, norms and layer scales too, so that all of it matters."""

    def make(**shape: object) -> nn.Module:
        torch.manual_seed(0)
        model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, initializer_range=0.02, **shape))
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or "lambda" in name or name.endswith(("position_embeddings", "token")):
                one = "lambda" in name or ("norm" in name and "weight" in name)
                nn.init.normal_(parameter, mean=float(one), std=0.1)
        return model.eval().requires_grad_(False)

    return make


@pytest.mark.parametrize(("image_px", "size"), [(518, (518, 518)), (224, (140, 224)), (448, (448, 28))])
def test_dinov2_equals_the_reference_at_every_size(image_px: int, size: tuple[int, int], dinov2_reference: Reference):
    theirs = dinov2_reference(num_hidden_layers=2, hidden_size=48, num_attention_heads=3)
    ours = dinov2.Dinov2Guide(depth=2, width=48, heads=3, image_px=image_px).eval().requires_grad_(False)
    ours.load_state_dict(ours.adapted(theirs.state_dict()), strict=True)
    image = 255 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = theirs(as_the_library_wants_it(image)).last_hidden_state[:, 1:]             # without the class token
    latent = ours(image)
    assert latent.shape == (2, 48, size[0] // 14, size[1] // 14)
    assert expected.std(dim=1).mean() > 0.05                                   # it depends on the place
    assert largest_difference(latent.flatten(2).transpose(1, 2), expected) < 1e-4


@pytest.mark.parametrize(("name", "width", "heads"), [("dinov2_small", 384, 6), ("dinov2_base", 768, 12)])
def test_each_dinov2_has_the_tensors_of_the_hubs_file(name: str, width: int, heads: int, transformers: ModuleType):
    """The hub's files have longer names for attention than the library has in memory; both load, nothing is left."""
    config = transformers.Dinov2Config(image_size=518, hidden_size=width, num_attention_heads=heads)
    with torch.device("meta"):
        ours, theirs = GUIDES[name].build(None), transformers.Dinov2Model(config)
    assert isinstance(ours, dinov2.Dinov2Guide)
    in_memory = theirs.state_dict()
    file = {}
    for key, value in in_memory.items():
        for new, old in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"),
                         ("o_proj", "output.dense")):
            key = key.replace(f".attention.{new}.", f".attention.{old}.")
        file[key] = value
    assert "encoder.layer.11.attention.attention.query.bias" in file
    assert len(file) == 223                                                    # 12 blocks of 18, and 7
    assert file["embeddings.position_embeddings"].shape == (1, 1 + 37 * 37, width)
    classifier = {f"dinov2.{key}": value for key, value in file.items()} | {"classifier.bias": torch.empty(2)}
    for state in (in_memory, file, classifier):
        ours.load_state_dict(ours.adapted(state), strict=True, assign=True)
    own = sum(parameter.numel() for parameter in ours.parameters())
    assert own == {"dinov2_small": 22_056_192, "dinov2_base": 86_579_712}[name]
    assert own + width == sum(parameter.numel() for parameter in theirs.parameters())      # all but the mask token


def test_dinov2_pads_a_broken_patch_with_the_mean_color():
    guide = filled(dinov2.Dinov2Guide(depth=1, width=16, heads=2, image_px=224))
    image = 255 * torch.rand(1, 3, 100, 224)                                   # 7.1 of 8 rows of patches
    padded = torch.cat([image, torch.tensor(MEAN).view(1, 3, 1, 1).expand(1, 3, 12, 224)], dim=2)
    assert guide(image).shape == (1, 16, 8, 16)
    assert largest_difference(guide(image), guide(padded)) < 1e-5


def test_dinov2_is_taken_unchecked_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setenv("NUGUIDE_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_guide("dinov2_small")
    for fact in ("model.safetensors of facebook/dinov2-small", "https://huggingface.co/facebook/dinov2-small",
                 "sha256 not known here, so it is taken unchecked", str(tmp_path / "dinov2-small.safetensors")):
        assert fact in str(caught.value)
    safetensors.torch.save_file(load_guide("dinov2_small", "random:3", 224).network.state_dict(),
                                tmp_path / "dinov2-small.safetensors")
    guide = load_guide("dinov2_small", image_px=224)
    assert "dinov2-small.safetensors is taken unchecked" in caplog.text
    assert len(guide.weights_id) == 12                          # a model pins what was found all the same


# MobileSAM, for which no library here has an encoder to compare with: facts, and its parts by hand --------------------


def official_mobile_sam() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the image encoder in mobile_sam.pt, written down from its published module."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_norm(name: str, *weight: int) -> None:
        shapes[f"{name}.c.weight"] = weight
        shapes.update({f"{name}.bn.{part}": weight[:1] for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    def layer(name: str, *weight: int) -> None:
        shapes.update({f"{name}.weight": weight, f"{name}.bias": weight[:1]})

    conv_norm("patch_embed.seq.0", 32, 3, 3, 3)
    conv_norm("patch_embed.seq.2", 64, 32, 3, 3)
    for index in (0, 1):
        conv_norm(f"layers.0.blocks.{index}.conv1", 256, 64, 1, 1)
        conv_norm(f"layers.0.blocks.{index}.conv2", 256, 1, 3, 3)
        conv_norm(f"layers.0.blocks.{index}.conv3", 64, 256, 1, 1)
    for stage, (narrow, wide) in enumerate([(64, 128), (128, 160), (160, 320)]):
        conv_norm(f"layers.{stage}.downsample.conv1", wide, narrow, 1, 1)
        conv_norm(f"layers.{stage}.downsample.conv2", wide, 1, 3, 3)
        conv_norm(f"layers.{stage}.downsample.conv3", wide, wide, 1, 1)
    for stage, width, depth, heads, window in ((1, 128, 2, 4, 7), (2, 160, 6, 5, 14), (3, 320, 2, 10, 7)):
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            shapes[f"{block}.attn.attention_biases"] = (heads, window * window)
            layer(f"{block}.attn.norm", width)
            layer(f"{block}.attn.qkv", 3 * width, width)
            layer(f"{block}.attn.proj", width, width)
            layer(f"{block}.mlp.norm", width)
            layer(f"{block}.mlp.fc1", 4 * width, width)
            layer(f"{block}.mlp.fc2", width, 4 * width)
            conv_norm(f"{block}.local_conv", width, 1, 3, 3)
    layer("norm_head", 320)
    layer("head", 1000, 320)
    neck = {"neck.0.weight": (256, 320, 1, 1), "neck.2.weight": (256, 256, 3, 3)}
    layer("neck.1", 256)
    layer("neck.3", 256)
    return {f"image_encoder.{name}": shape for name, shape in (shapes | neck).items()}


def test_mobile_sam_has_the_tensors_of_the_official_file():
    shapes = official_mobile_sam()
    with torch.device("meta"):
        ours = GUIDES["mobile_sam"].build(None)
        file = {key: torch.empty(shape) for key, shape in shapes.items()}
    assert isinstance(ours, mobilesam.MobileSamGuide)
    ours.load_state_dict(ours.adapted(file | {"mask_decoder.y": torch.empty(0)}), strict=True, assign=True)
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    neck, classifier = 320 * 256 + 2304 * 256 + 4 * 256, 2 * 320 + 321_000
    assert parameters - neck + classifier == 5_392_764   # TinyViT-5M for ImageNet
    # with SAM's prompt encoder (6,476 numbers) and mask decoder (4,058,340) it fills the file, but for a frame
    numbers = sum(value.numel() for value in file.values()) + 6_476 + 4_058_340
    assert 0.99 < 4 * numbers / (GUIDES["mobile_sam"].bytes or 0) < 1


def test_mobile_sams_latent_of_1024_px_has_sams_grid():
    with torch.inference_mode():
        assert GUIDES["mobile_sam"].build(None).eval()(torch.zeros(1, 3, 1024, 700)).shape == (1, 256, 64, 44)


def test_distances_within_a_window_have_one_number_each():
    numbers = mobilesam.distances(3)
    assert numbers.shape == (9, 9)
    assert numbers[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]                  # from the corner: row by row
    assert numbers[4].tolist() == [4, 3, 4, 1, 0, 1, 4, 3, 4]                  # from the middle
    assert int(numbers[7, 0]) == 2 * 3 + 1                                     # two rows, one column
    assert torch.equal(numbers, numbers.T)


def test_window_attention_equals_the_same_written_out_window_by_window():
    """5 x 8 tokens in windows of 7: zeros are added before the norm, and attended to."""
    attention = mobilesam.Attention(64, 7)
    filled(attention)
    tokens = torch.randn(1, 5, 8, 64, generator=torch.Generator().manual_seed(2))
    padded = torch.zeros(7, 14, 64)
    padded[:5, :8] = tokens[0]
    expected = torch.zeros(7, 14, 64)
    for left in (0, 7):
        window = attention.norm(padded[:, left : left + 7].reshape(49, 64))
        per_head = nn.functional.linear(window, attention.qkv.weight, attention.qkv.bias).view(49, 2, 96)
        heads = []
        for head in range(2):
            q, k, v = per_head[:, head].split(32, dim=1)
            logits = q @ k.T / 32**0.5
            for i in range(49):
                for j in range(49):
                    rows, columns = abs(i // 7 - j // 7), abs(i % 7 - j % 7)
                    logits[i, j] += attention.attention_biases[head, 7 * rows + columns]
            heads.append(logits.softmax(1) @ v)
        out = nn.functional.linear(torch.cat(heads, 1), attention.proj.weight, attention.proj.bias)
        expected[:, left : left + 7] = out.view(7, 7, 64)
    assert largest_difference(attention(tokens)[0], expected[:5, :8]) < 1e-5


def test_mobile_sam_folds_its_batch_norms_and_pads_as_sam_does(image: Tensor):
    guide = load_guide("mobile_sam", "random:0", 256)
    before = guide(image)
    oblong = guide(image[..., :100, :])
    padded = torch.tensor(MEAN).view(1, 3, 1, 1).repeat(1, 1, 256, 256)
    padded[..., :100, :] = image[..., :100, :]
    assert oblong.shape == (1, 256, 7, 16)
    assert relative_error(oblong, guide(padded)[:, :, :7]) < 1e-5
    fold_batch_norm(guide)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in guide.modules())
    assert relative_error(guide(image), before) < 1e-4


# What SAM's guide does around and inside the encoder ------------------------------------------------------------------


def test_the_mean_color_is_zero_to_the_encoder():
    guide = tiny_sam()
    filled(guide)
    mean_color = torch.tensor(MEAN).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert largest_difference(guide(mean_color), guide.encoder(torch.zeros(1, 3, 64, 64))) < 1e-5


def test_an_oblong_image_is_padded_after_normalizing_and_the_padding_is_cut_away():
    guide = tiny_sam()
    filled(guide)
    image = 255 * torch.rand(2, 3, 40, 64)                                     # 2.5 of 4 rows of patches
    latent = guide(image)
    padded = torch.cat([image, torch.tensor(MEAN).view(1, 3, 1, 1).expand(2, 3, 24, 64)], dim=2)
    assert latent.shape == (2, 256, 3, 4)
    assert largest_difference(latent, guide(padded)[:, :, :3]) < 1e-5


@pytest.mark.parametrize(
    ("size", "grid"), [((64, 64), (4, 4)), ((1, 1), (4, 4)), ((37, 91), (2, 4)), ((91, 37), (4, 2)), ((3, 500), (1, 4))]
)
def test_any_size_is_resized_so_that_the_longest_side_fills_the_grid(size: tuple[int, int], grid: tuple[int, int]):
    guide = tiny_sam()
    filled(guide)
    assert guide(torch.rand(1, 3, *size)).shape == (1, 256, *grid)


def test_an_enlarged_image_gives_nearly_the_same_latent():
    guide = tiny_sam()
    filled(guide)
    small = 255 * torch.rand(1, 3, 4, 4)
    smooth = nn.functional.interpolate(small, (64, 64), mode="bilinear")
    large = nn.functional.interpolate(small, (256, 256), mode="bilinear")
    assert relative_error(guide(large), guide(smooth)) < 0.02


def test_windows_divide_and_join():
    tokens = torch.rand(2, 16, 20, 5)
    windows = sam.divided(tokens, 14, torch.zeros(5))                          # 28 x 28 after padding
    assert windows.shape == (2 * 2 * 2, 14 * 14, 5)
    assert torch.equal(sam.joined(windows.view(-1, 14, 14, 5), 16, 20), tokens)
    assert torch.equal(windows[0, 14], tokens[0, 1, 0])
    assert torch.equal(windows[1, 0], tokens[0, 0, 14])
    assert windows[7, -1].sum() == 0                                           # beyond the last row and column


@pytest.mark.parametrize("rows", [1, 3])
def test_attention_in_parts_equals_attention_at_once(rows: int, monkeypatch: pytest.MonkeyPatch):
    guide = tiny_sam(256)
    filled(guide)
    image = 255 * torch.rand(2, 3, 256, 256)
    at_once = guide(image)
    row_bytes = 2 * 2 * 16**3 * 4                                              # images, heads, grid, float32
    monkeypatch.setattr(sam, "BIAS_BYTES", {"cpu": rows * row_bytes})
    assert largest_difference(guide(image), at_once) < 1e-5


def test_position_tables_fit_another_grid():
    ramp = torch.arange(64.0).view(1, 64, 1, 1).expand(1, 64, 64, 2)
    half = sam.resized_positions(ramp, 32)
    assert half.shape == (1, 32, 32, 2)
    assert torch.allclose(half[0, 3:-3, 0, 0], 2 * torch.arange(3.0, 29.0) + 0.5, atol=1e-4)   # cell centers
    assert sam.resized_positions(ramp, 64) is ramp
    distances = torch.arange(-63.0, 64.0)[:, None].expand(127, 2)
    for grid in (32, 16):
        resized = sam.resized_distances(distances, grid)
        assert resized.shape == (2 * grid - 1, 2)
        assert resized[grid - 1, 0].abs() < 1e-4                               # distance 0 stays in the middle
        assert torch.allclose(resized, -resized.flip(0), atol=1e-4)
    assert sam.resized_distances(distances, 64) is distances


@pytest.mark.parametrize("image_px", [512, 256])
def test_the_published_file_fits_smaller_inputs(image_px: int):
    shapes = official_shapes(1, 32, 16, {0})                                   # one global block: all tables change
    guide = sam.SamGuide(depth=1, width=32, heads=2, global_blocks=(0,), image_px=image_px)
    generator = torch.Generator().manual_seed(0)
    file = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    guide.load_state_dict(guide.adapted(file), strict=True)
    assert guide(torch.rand(1, 3, 256, 256)).shape == (1, 256, image_px // 16, image_px // 16)


# The door -------------------------------------------------------------------------------------------------------------


def test_both_file_formats_load_through_the_door(tiny: str, tmp_path: Path, image: Tensor):
    network = tiny_sam()
    state = filled(network).state_dict()
    official = {key.replace("encoder.", "image_encoder.", 1): value for key, value in state.items()}
    torch.save(official | {"mask_decoder.iou_token.weight": torch.zeros(1, 256)}, tmp_path / "sam.pth")
    hub_names = {
        "blocks.": "layers.",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "patch_embed.proj.": "patch_embed.projection.",
        "neck.0": "neck.conv1",
        "neck.1": "neck.layer_norm1",
        "neck.2": "neck.conv2",
        "neck.3": "neck.layer_norm2",
    }
    hub = {}
    for key, value in state.items():
        for ours, theirs in hub_names.items():
            key = key.replace(ours, theirs)
        hub["vision_" + key] = value
    safetensors.torch.save_file(hub, tmp_path / "model.safetensors")
    expected = network(image)
    loaded = [load_guide(tiny, tmp_path / name) for name in ("sam.pth", "model.safetensors")]
    for guide in loaded:
        assert torch.equal(guide(image), expected)
    assert loaded[0].weights_id != loaded[1].weights_id                        # different files
    assert loaded[0].weights_id == load_guide(tiny, str(tmp_path / "sam.pth"), image_px=32).weights_id
    assert load_guide(tiny, tmp_path / "sam.pth", image_px=32)(image).shape == (1, 256, 2, 2)


def test_weights_of_another_network_are_refused_by_name(tiny: str, tmp_path: Path):
    state = tiny_sam().state_dict()
    del state["encoder.neck.3.bias"]
    state["encoder.blocks.9.norm1.weight"] = torch.zeros(32)
    state["encoder.neck.0.weight"] = torch.zeros(256, 64, 1, 1)
    bare = {key.removeprefix("encoder."): value for key, value in state.items()}
    torch.save(bare, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not hold the weights of tiny") as caught:
        load_guide(tiny, tmp_path / "other.pth")
    for problem in (
        "1 missing (encoder.neck.3.bias)",
        "1 unexpected (encoder.blocks.9.norm1.weight)",
        "encoder.neck.0.weight (256, 64, 1, 1) instead of (256, 32, 1, 1)",
    ):
        assert problem in str(caught.value)
    with pytest.raises(UserError, match="does not hold the weights of efficientnet_lite0"):
        load_guide("efficientnet_lite0", tmp_path / "other.pth")


@pytest.mark.parametrize("name", GUIDES)
def test_every_spec_states_what_a_user_must_know(name: str):
    spec = GUIDES[name]
    with torch.device("meta"):
        assert spec.build(None).state_dict()
    assert spec.name == name
    assert spec.license
    assert spec.citation
    assert spec.home.startswith("https://")
    assert (spec.url is None) or (spec.url.endswith(spec.filename) and spec.bytes and len(spec.sha256 or "") == 64)
    assert spec.grid() == ({16: 64, 14: 37}[spec.stride] if spec.image_px else None)
    assert spec.grid(448) == {16: 28, 14: 32}[spec.stride]


def test_unknown_names_and_sizes_list_the_choices():
    with pytest.raises(ValueError, match="unknown guide 'sam'; choose from efficientnet_lite0, "):
        load_guide("sam")
    with pytest.raises(ValueError, match="image_px=300; choose from 1024, 512, 256"):
        load_guide("sam_vit_b", image_px=300)
    with pytest.raises(ValueError, match="takes any size"):
        load_guide("efficientnet_lite0", image_px=256)
    with pytest.raises(ValueError, match="random:SEED"):
        load_guide("sam_vit_b", "random:x")


def test_weights_that_are_nowhere_are_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NUGUIDE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="vit_b_histopathology") as caught:
        load_guide("pathosam")
    assert "https://github.com/computational-cell-analytics/patho-sam" in str(caught.value)


@pytest.mark.parametrize("name", ["tiny", *EFFICIENTNETS, "dinov2_small", "mobile_sam"])
def test_a_guide_is_frozen(name: str, tiny: str, image: Tensor):
    guide = load_guide(name, None if name in EFFICIENTNETS else "random:0", SMALL_PX.get(name))
    before = guide(image)
    wrapper = nn.Sequential(guide)
    wrapper.train()
    assert not any(module.training for module in guide.modules())
    assert not any(parameter.requires_grad for parameter in guide.parameters())
    assert not guide(image).requires_grad
    assert torch.equal(guide(image), before)
    assert torch.equal(guide(image.to(torch.uint8)), before)
    assert before.shape[1] == guide.channels == guide.spec.channels
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 1, 256, 256\)"):
        guide(image[:, :1])


@pytest.mark.parametrize("name", ["tiny", *EFFICIENTNETS, "dinov2_small", "mobile_sam"])
def test_random_weights_are_a_seeded_control(
    name: str, tiny: str, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NUGUIDE_CACHE", str(tmp_path / "cache"))
    first, again, other = (
        load_guide(name, weights, SMALL_PX.get(name)) for weights in ("random:1", "random:1", "random:2")
    )
    assert first.weights_id == "random-1"
    assert other.weights_id == "random-2"
    assert torch.equal(first(image), again(image))
    assert relative_error(other(image), first(image)) > 0.5
    latent = first(image)
    assert 0.1 < latent.std() < 10                                             # a signal of ordinary size
    assert latent.std(dim=(2, 3)).median() > 0.05                              # that depends on the place
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("size", [(256, 192), (33, 100), (1, 17)])
def test_the_pyramid_adds_the_features_at_strides_8_and_4_packed_into_cells_of_16(
    efficientnet: FrozenGuide, size: tuple[int, int]
):
    """Of one and the same network: 40 channels at stride 8 in 2 x 2 places a cell, 24 at stride 4 in 4 x 4."""
    pyramid, image = load_guide("efficientnet_lite0_pyramid"), 255 * torch.rand(1, 3, *size)
    assert pyramid.weights_id == efficientnet.weights_id
    assert pyramid.spec.finer == ((40, 2), (24, 4))
    latent = pyramid(image)
    height, width = latent.shape[2:]
    assert latent.shape == (1, 432 + 4 * 40 + 16 * 24, -(-size[0] // 16), -(-size[1] // 16))
    assert torch.equal(latent[:, :432], efficientnet(image))
    network = pyramid.network
    assert isinstance(network, guides.efficientnet.EfficientNetLite0)
    eighth, fourth = network.features(image, 4, 2)
    assert [x.shape[1] for x in (eighth, fourth)] == [40, 24]
    for x, packed, times in ((eighth, latent[:, 432:592], 2), (fourth, latent[:, 592:], 4)):
        found = nn.functional.pixel_shuffle(packed, times)
        assert found.shape[2:] == (times * height, times * width)
        assert torch.equal(found[..., : x.shape[2], : x.shape[3]], x)


@pytest.fixture(scope="module")
def efficientnet() -> FrozenGuide:
    return load_guide("efficientnet_lite0")


def test_efficientnet_knows_a_cat(efficientnet: FrozenGuide):
    cat = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None].float()
    cat = nn.functional.interpolate(cat[..., 75:375], (224, 224), mode="bilinear", antialias=True)
    network = efficientnet.network
    assert isinstance(network, guides.efficientnet.EfficientNetLite0)
    assert int(network.classify(cat).argmax()) in CATS
    assert efficientnet.weights_id == "579344248a93"


@pytest.mark.parametrize("size", [(256, 256), (33, 100), (1, 17)])
def test_efficientnet_takes_any_size(efficientnet: FrozenGuide, size: tuple[int, int]):
    latent = efficientnet(255 * torch.rand(2, 3, *size))
    assert latent.shape == (2, 432, -(-size[0] // 16), -(-size[1] // 16))


def test_efficientnet_comes_close_in_bfloat16(efficientnet: FrozenGuide, image: Tensor):
    with torch.autocast("cpu", torch.bfloat16):
        latent = efficientnet(image)
    assert relative_error(latent, efficientnet(image)) < 0.1        # no layer norm calls the rounding errors back


def test_efficientnet_weights_load_from_a_path_too(efficientnet: FrozenGuide, tmp_path: Path, image: Tensor):
    given = load_guide("efficientnet_lite0", guides.efficientnet.weights_file())
    assert given.weights_id == efficientnet.weights_id
    safetensors.torch.save_file(efficientnet.network.state_dict(), tmp_path / "own.safetensors")
    assert torch.equal(load_guide("efficientnet_lite0", tmp_path / "own.safetensors")(image), efficientnet(image))
