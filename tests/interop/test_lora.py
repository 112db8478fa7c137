"""LoRA files: one strength for every tool, and a stranger's file that is read or refused in one line."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fewstep.adapters import LoraOptions, adapted, adapters, fold, twin
from fewstep.denoiser import Wrapped
from fewstep.errors import Refused
from fewstep.interop import Teacher, load_student, load_teacher, save_student
from fewstep.interop.contract import Contract, Steps
from fewstep.interop.lora import FILES, FOLDER, Pair, fold_into, lora_of, read_lora, restore, save_lora, write_lora
from fewstep.nets import build
from fewstep.path import Straight
from fewstep.student import Student, frozen

ODD = LoraOptions(rank=4, alpha=10.0, targets="all")  # alpha that is not the rank, on linear and convolution
CONTRACT = Contract(
    fewstep="0", method="dmd2", prediction="velocity", path=Straight(), clock="1000t", start=1.0, start_scale=1.0,
    shape=(4, 4, 4), steps=(Steps(count=1, times=(1.0,), sigmas=(1.0,)),),
)  # fmt: skip


def moved(net, seed=3, size=0.3):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapters(net):
            layer.lora_up.add_(size * torch.randn(layer.lora_up.shape, generator=rng))
    return net


class Toy(nn.Module):
    """A linear layer, a convolution and an attention, in the places that names can go wrong."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 6, 3)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"to_q": nn.Linear(6, 6), "to_out": nn.ModuleList([nn.Linear(6, 5)])})]
        )


def pair(out, entry, rank=2, seed=0, kernel=()):
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, entry, *kernel, generator=rng),
        torch.randn(out, rank, *(1 for _ in kernel), generator=rng),
    )


def file_of(tmp_path, tensors, metadata=None, name="style.safetensors"):
    file = tmp_path / name
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(file), metadata=metadata)
    return file


# -- out: three tools, one student --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stable():
    """A tiny Stable Diffusion, without text encoder and autoencoder of any use."""
    pytest.importorskip("peft")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=4, sample_size=4)
    return StableDiffusionPipeline(vae, None, None, unet, DDIMScheduler(), None, None, requires_safety_checker=False)


@torch.no_grad()
def answer(unet):
    rng = torch.Generator().manual_seed(0)
    return unet(
        torch.randn(2, 4, 4, 4, generator=rng), 500, encoder_hidden_states=torch.randn(2, 3, 6, generator=rng)
    ).sample


@pytest.mark.parametrize("options", [ODD, LoraOptions(rank=2, alpha=1.0)], ids=["all", "attention"])
def test_the_merged_student_diffusers_and_kohya_agree_where_alpha_is_not_the_rank(stable, tmp_path, options):
    student = moved(adapted(stable.unet, options))
    merged = answer(fold(twin(student)))
    plain = answer(stable.unet)
    assert (merged - plain).abs().max() > 0.01
    lora = lora_of(student, "unet")
    for names in ("diffusers", "kohya"):
        file = tmp_path / FILES[names]
        write_lora(lora, file, names, CONTRACT)
        stable.load_lora_weights(str(tmp_path), weight_name=file.name)  # as a user does, in plain diffusers
        assert (answer(stable.unet) - merged).abs().max() < 1e-5, names
        stable.unload_lora_weights()
        assert torch.equal(answer(stable.unet), plain)
    # kohya's own formula, W + alpha / rank up down, by kohya's own names
    tensors = load_file(tmp_path / FILES["kohya"])
    by_hand, layers = twin(stable.unet), 0
    with torch.no_grad():
        for path, layer in by_hand.named_modules():
            name = "lora_unet_" + path.replace(".", "_")
            if f"{name}.lora_down.weight" in tensors:
                down, up = tensors.pop(f"{name}.lora_down.weight"), tensors.pop(f"{name}.lora_up.weight")
                alpha = float(tensors.pop(f"{name}.alpha"))
                assert alpha == down.shape[0]
                added = torch.einsum("or,r...->o...", up.flatten(1), down) * alpha / down.shape[0]
                layer.weight = nn.Parameter(layer.weight + added)
                layers += 1
    assert not tensors and layers == len(list(adapters(student)))
    assert (answer(by_hand) - merged).abs().max() < 1e-5


def test_the_file_says_how_it_is_to_be_sampled(tmp_path):
    student = moved(adapted(Toy(), ODD))
    write_lora(lora_of(student, "unet"), tmp_path / "a.safetensors", "kohya", CONTRACT)
    _, header = read_lora(tmp_path / "a.safetensors")
    assert header["fewstep.steps"] == "1" and json.loads(header["fewstep.times"]) == {"1": [1.0]}
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "4"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]


def test_what_is_no_lora_has_no_lora_file():
    assert lora_of(Toy(), "unet") is None
    student = adapted(Toy(), ODD)
    student.extra = nn.Linear(2, 2)
    assert lora_of(student, "unet") is None


# -- a student folder ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A LoRA student of a small transformer, in its folder."""
    torch.manual_seed(0)
    net = build({"kind": "dit", "shape": (1, 4, 4), "width": 8, "depth": 1, "heads": 2})
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.1 * torch.randn_like(value))
    teacher = Teacher(frozen(Wrapped(net, Straight(), "velocity", "1000t")), (1, 4, 4), "toy", "own")
    student = Student(moved(adapted(teacher.denoiser, ODD)), teacher.shape)
    folder = tmp_path_factory.mktemp("lora") / "student"
    assert save_student(student, folder, method="dmd2", teacher=teacher, program=False).ok
    return teacher, student, folder


def test_a_lora_student_ships_merged_with_its_lora_beside_it(shipped):
    teacher, student, folder = shipped
    loaded = load_student(folder)
    assert not list(adapters(loaded.student)) and loaded.contract.training["lora"] == 4
    noise = torch.randn(3, *student.shape, generator=torch.Generator().manual_seed(0))
    wanted = student.generate(noise)
    assert (loaded.student.generate(noise) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    for names in FILES:
        again = twin(teacher.denoiser)
        fold_into({"unet": again.net}, folder / FOLDER / FILES[names])
        got = Student(again, student.shape).generate(noise)
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_save_lora_takes_the_lora_of_a_student_folder_under_either_name(shipped, tmp_path):
    _, student, folder = shipped
    one = save_lora(folder, tmp_path / "here")
    other = save_lora(folder, tmp_path / "mine.safetensors", "kohya")
    assert (one.name, other.name) == (FILES["diffusers"], "mine.safetensors")
    for file in (one, other):
        net = twin(student.denoiser.net)
        bare = {n: torch.zeros_like(layer.weight) for n, layer in adapters(net)}
        found = fold_into({"unet": _emptied(net)}, file)
        for path, layer in adapters(student.denoiser.net):
            torch.testing.assert_close(found[f"unet.{path}"].product().view_as(bare[path]), layer.delta())
    with pytest.raises(Refused, match="already there"):
        save_lora(folder, tmp_path / "here")
    with pytest.raises(Refused, match="diffusers or kohya names"):
        save_lora(folder, tmp_path / "x", "comfy")
    (folder / "lora").rename(folder / "away")
    with pytest.raises(Refused, match="holds no LoRA"):
        save_lora(folder, tmp_path / "x")
    (folder / "away").rename(folder / "lora")
    assert not (tmp_path / "x").exists()


def _emptied(net):
    plain = fold(net)
    with torch.no_grad():
        for value in plain.parameters():
            value.data = torch.zeros_like(value)
    return plain


def test_a_student_goes_on_from_the_lora_of_another(shipped):
    teacher, student, folder = shipped
    fresh = adapted(teacher.denoiser, ODD)
    restore(fresh.net, folder)
    for (_, a), (_, b) in zip(adapters(fresh), adapters(student), strict=True):
        torch.testing.assert_close(a.delta(), b.delta())
    with pytest.raises(Refused, match="rank 4 at .*student.lora needs 2"):
        restore(adapted(teacher.denoiser, LoraOptions(rank=2, targets="all")).net, folder)
    with pytest.raises(Refused, match="adapts other layers"):
        restore(adapted(teacher.denoiser, LoraOptions(targets="stem")).net, folder)


# -- in: a style becomes a fast style -----------------------------------------------------------------------


@pytest.mark.slow
def test_the_lora_of_a_student_of_a_styled_teacher_holds_the_style_as_well(pipes, here, tmp_path):
    pipes.ddim().save_pretrained(str(tmp_path / "base"))
    down, up = pair(8, 1, rank=2, kernel=(3, 3))
    style = file_of(
        tmp_path, {"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": 0.1 * up},
        {"modelspec.license": "cc-by-nc-4.0"},
    )  # fmt: skip
    base = load_teacher(tmp_path / "base")
    teacher = load_teacher(tmp_path / "base", lora=style, strength=0.5)
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 0.5
    assert (teacher.denoiser(x, t) - base.denoiser(x, t)).abs().max() > 1e-3
    assert teacher.name == "base+style" and teacher.licence == "unknown; LoRA: cc-by-nc-4.0"
    assert len({base.sha256, teacher.sha256, load_teacher(tmp_path / "base", lora=style).sha256}) == 3
    student = Student(moved(adapted(teacher.denoiser, ODD)), teacher.shape)
    save_student(student, tmp_path / "student", method="dmd2", teacher=teacher)
    wanted = student.generate(x)
    for names in FILES:  # the user puts the one file on the base that he has
        again = load_teacher(tmp_path / "base", lora=tmp_path / "student" / FOLDER / FILES[names])
        got = Student(again.denoiser, student.shape).generate(x)
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert len(load_file(tmp_path / "student" / FOLDER / FILES["diffusers"])["unet.conv_in.lora_A.weight"]) == 2 + 4


NAMES = {
    "peft": ("blocks.0.to_q.lora_A.weight", "blocks.0.to_q.lora_B.weight"),
    "peft adapter": ("blocks.0.to_q.lora_A.default.weight", "blocks.0.to_q.lora_B.default.weight"),
    "peft model": ("base_model.model.blocks.0.to_q.lora_A.weight", "base_model.model.blocks.0.to_q.lora_B.weight"),
    "diffusers": ("unet.blocks.0.to_q.lora.down.weight", "unet.blocks.0.to_q.lora.up.weight"),
    "processors": ("unet.blocks.0.processor.to_q_lora.down.weight", "unet.blocks.0.processor.to_q_lora.up.weight"),
    "kohya": ("lora_unet_blocks_0_to_q.lora_down.weight", "lora_unet_blocks_0_to_q.lora_up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("names", NAMES.values(), ids=list(NAMES))
@pytest.mark.parametrize("alpha", [None, 7.0])
def test_every_tools_names_are_read_and_alpha_is_honoured(tmp_path, names, alpha):
    net, (down, up) = Toy(), pair(6, 6)
    before = net.blocks[0]["to_q"].weight.detach().clone()
    tensors = dict(zip(names, (down, up), strict=True))
    if alpha is not None:
        tensors[f"{_base(names[0])}.alpha"] = torch.tensor(alpha)
    fold_into({"unet": net}, file_of(tmp_path, tensors), strength=0.5)
    scale = 1.0 if alpha is None else alpha / 2
    torch.testing.assert_close(net.blocks[0]["to_q"].weight, before + 0.5 * scale * up @ down)


def _base(name):
    ends = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight")
    return next(name.removesuffix(end) for end in ends if name.endswith(end))


@pytest.mark.parametrize(
    ("facts", "scale"),
    [
        ({"unet.r": 2, "unet.lora_alpha": 5}, 2.5),
        ({"r": 2, "lora_alpha": 5, "alpha_pattern": {"blocks.0.to_q": 3}}, 1.5),
        ({"unet.lora_alpha": 5, "unet.use_rslora": True}, 5 / math.sqrt(2)),
    ],
    ids=["one alpha", "pattern", "rank-stabilised"],
)
def test_alpha_in_the_header_is_honoured(tmp_path, facts, scale):
    net, (down, up) = Toy(), pair(6, 6)
    before = net.blocks[0]["to_q"].weight.detach().clone()
    tensors = {"unet.blocks.0.to_q.lora_A.weight": down, "unet.blocks.0.to_q.lora_B.weight": up}
    fold_into({"unet": net}, file_of(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(facts)}))
    torch.testing.assert_close(net.blocks[0]["to_q"].weight, before + scale * up @ down)


def test_convolutions_and_the_last_layer_of_an_attention_are_found(tmp_path):
    net = Toy()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    (down, up), (d2, u2) = pair(6, 3, kernel=(3, 3)), pair(5, 6)
    tensors = {
        "lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up,
        "unet.blocks.0.processor.to_out_lora.down.weight": d2, "unet.blocks.0.processor.to_out_lora.up.weight": u2,
    }  # fmt: skip
    fold_into({"unet": net}, file_of(tmp_path, tensors))
    added = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    torch.testing.assert_close(net.conv_in.weight, before["conv_in.weight"] + added)
    torch.testing.assert_close(net.blocks[0]["to_out"][0].weight, before["blocks.0.to_out.0.weight"] + u2 @ d2)


def test_blocks_numbered_as_in_the_original_code_are_translated(stable, tmp_path):
    unet = twin(stable.unet)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = unet.get_submodule(path)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    before, (down, up) = layer.weight.detach().clone(), pair(8, 8)
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(6.0)}
    from diffusers import StableDiffusionXLPipeline

    fold_into({"unet": unet}, file_of(tmp_path, tensors), converter=StableDiffusionXLPipeline)
    torch.testing.assert_close(layer.weight, before + 3 * up @ down)


# -- hostile files ------------------------------------------------------------------------------------------

Q = "unet.blocks.0.to_q"
GOOD = {f"{Q}.lora_A.weight": pair(6, 6)[0], f"{Q}.lora_B.weight": pair(6, 6)[1]}
STRANGE = {"unet.x.lora_A.weight": torch.ones(1, 1), "unet.x.lora_B.weight": torch.ones(1, 1)}
BAD = {
    "a NaN": ({**GOOD, f"{Q}.lora_B.weight": torch.full((6, 2), math.nan)}, "holds a NaN"),
    "an infinite alpha": ({**GOOD, f"{Q}.alpha": torch.tensor(math.inf)}, "holds a NaN or an infinity"),
    "whole numbers": ({**GOOD, f"{Q}.lora_B.weight": torch.ones(6, 2, dtype=torch.int64)}, "floating-point"),
    "no up": ({f"{Q}.lora_A.weight": GOOD[f"{Q}.lora_A.weight"]}, r"has no \.lora_B\.weight beside it"),
    "ranks that differ": ({**GOOD, f"{Q}.lora_B.weight": torch.ones(6, 3)}, "no LoRA pair"),
    "no rank": ({f"{Q}.lora_A.weight": torch.ones(0, 6), f"{Q}.lora_B.weight": torch.ones(6, 0)}, "no LoRA pair"),
    "another width": ({**GOOD, f"{Q}.lora_B.weight": torch.ones(7, 2)}, r"changes a weight \[7, 6\], .* is \[6, 6\]"),
    "a scalar": ({**GOOD, f"{Q}.lora_A.weight": torch.ones(())}, "no LoRA pair"),
    "names of nothing": ({k.replace("to_q", "to_z"): v for k, v in GOOD.items()}, "none of its 1 names fits"),
    "one strange name": ({**GOOD, **STRANGE}, "1 of its 2 names do not fit"),
    "a DoRA": ({**GOOD, f"{Q}.lora_magnitude_vector": torch.ones(6)}, "no part of a plain LoRA"),
    "a LoHa": ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "no part of a plain LoRA"),
    "only alphas": ({f"{Q}.alpha": torch.ones(())}, "holds no LoRA"),
    "an alpha of two numbers": ({**GOOD, f"{Q}.alpha": torch.ones(2)}, "alpha is no number"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "complaint"), BAD.values(), ids=list(BAD))
def test_a_bad_file_is_refused_in_one_line_and_changes_nothing(tmp_path, tensors, complaint):
    net = Toy()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(Refused, match=complaint) as caught:
        fold_into({"unet": net}, file_of(tmp_path, tensors))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("header", ["[]", "{", '{"lora_alpha": "x"}', '{"alpha_pattern": 3}', '{"use_dora": true}'])
def test_a_bad_header_is_refused(tmp_path, header):
    with pytest.raises(Refused):
        fold_into({"unet": Toy()}, file_of(tmp_path, GOOD, {"lora_adapter_metadata": header}))


def test_pickles_folders_and_broken_files_are_refused(tmp_path):
    for name, content, complaint in (
        ("a.pt", b"x", "is a pickle"), ("a.bin", b"x", "is a pickle"), ("a.safetensors", b"\x10", "truncated"),
        ("b.safetensors", file_of(tmp_path, GOOD).read_bytes()[:-8], "truncated"),
        ("none.safetensors", None, "missing"),
    ):  # fmt: skip
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(Refused, match=complaint):
            read_lora(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="holds no LoRA"):
        read_lora(tmp_path / "empty")


def test_a_strange_file_that_the_pipelines_own_reader_cannot_take_is_refused(stable, tmp_path):
    for name in ("lora_unet_input_blocks_1_1_x", "nonsense"):
        tensors = {f"{name}.lora_down.weight": torch.ones(1, 1), f"{name}.lora_up.weight": torch.ones(1, 1)}
        with pytest.raises(Refused, match="names") as caught:
            fold_into({"unet": stable.unet}, file_of(tmp_path, tensors), converter=type(stable))
        assert "\n" not in str(caught.value)


def test_a_name_that_could_mean_two_layers_means_neither(tmp_path):
    net = nn.ModuleDict({"a": nn.ModuleDict({"b_c": nn.Linear(2, 2)}), "a_b": nn.ModuleDict({"c": nn.Linear(2, 2)})})
    tensors = {"lora_unet_a_b_c.lora_down.weight": torch.ones(1, 2), "lora_unet_a_b_c.lora_up.weight": torch.ones(2, 1)}
    with pytest.raises(Refused, match="none of its 1 names"):
        fold_into({"unet": net}, file_of(tmp_path, tensors))


def test_two_pairs_for_one_layer_add_up():
    one, other = Pair(*pair(6, 6)), Pair(*pair(6, 6, rank=3, seed=1))
    torch.testing.assert_close(one.then(other).product(), one.product() + other.product())


@pytest.mark.parametrize("lora", ["digits.pt", "gone.safetensors"])
def test_a_teacher_with_a_lora_that_is_none_is_refused(tmp_path, lora):
    (tmp_path / "digits.pt").write_bytes(b"")
    with pytest.raises(Refused):
        load_teacher("digits", lora=tmp_path / lora)


def test_a_network_of_ours_takes_a_lora_as_well(tmp_path):
    plain = load_teacher("digits")
    net = plain.denoiser.net
    weight = net.mid_block.attentions[0].to_q.weight
    down, up = pair(*weight.shape)
    name = "unet.mid_block.attentions.0.to_q"
    styled = load_teacher(
        "digits", lora=file_of(tmp_path, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    )
    torch.testing.assert_close(styled.denoiser.net.mid_block.attentions[0].to_q.weight, weight + up @ down)
    assert styled.name == "digits+style" or styled.name.endswith("+style")
    assert isinstance(net, type(build(net.config)))
