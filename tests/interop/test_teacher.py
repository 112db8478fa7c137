import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.denoiser import Wrapped
from fewstep.errors import Refused
from fewstep.interop import Teacher, load_teacher, save_teacher
from fewstep.nets import DiT, DiTConfig, UNet, UNetConfig
from fewstep.path import Exploding, Straight, Tabulated

UNET = UNetConfig(shape=(1, 8, 8), widths=(8, 16), groups=4, classes=3)


def edm(net, boundary=0.002):
    path = Exploding(sigma_min=0.02, sigma_max=20.0)
    return Wrapped(net, path, "cm", "250 log_sigma", scale_input=True, data_std=0.75, boundary=boundary)


@pytest.mark.parametrize(
    ("kind", "path", "prediction", "clock", "classes", "null"),
    [
        ("ddpm", Tabulated, "eps", "index", None, None),
        ("ddim", Tabulated, "eps", "index", None, None),
        ("dit", Tabulated, "eps", "index", 1000, 1000),
        ("cm", Exploding, "cm", "250 log_sigma", 5, None),
    ],
)
def test_a_pipeline_folder_becomes_a_teacher_with_its_facts(teachers, kind, path, prediction, clock, classes, null):
    teacher = teachers[kind]
    assert isinstance(teacher.denoiser.path, path)
    assert (teacher.denoiser.prediction, teacher.denoiser.clock) == (prediction, clock)
    assert (teacher.classes, teacher.null_label) == (classes, null)
    assert teacher.name == kind
    assert len(teacher.sha256) == 64
    assert teacher.licence == "unknown"
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    cond = None if classes is None else torch.tensor([1, 2])
    assert torch.isfinite(teacher.denoiser(x, 0.5, cond)).all()


def test_the_null_condition_is_the_recorded_one_or_is_refused(teachers):
    assert teachers["dit"].null(torch.tensor([4, 5])).tolist() == [1000, 1000]
    with pytest.raises(Refused, match="cannot be guided"):
        teachers["cm"].null(torch.tensor([1]))
    assert teachers["ddpm"].null(None) is None


def test_null_conditions_of_text_are_the_recorded_rows():
    teacher = Teacher(None, (1,), "t", "k", negative={"a": torch.zeros(2, 3), "b": torch.full((2,), 7.0)})
    null = teacher.null({"a": torch.ones(4, 3), "b": torch.ones(4)})
    assert null["a"].shape == (4, 3)
    assert null["b"].tolist() == [7.0] * 4


def test_an_autoencoder_stands_between_data_and_denoiser(teachers):
    teacher = teachers["dit"]
    pictures = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = teacher.encode(pictures)
    assert latents.shape == (2, *teacher.shape)
    assert teacher.decode(latents).shape == pictures.shape
    scale = teacher.pipeline.vae.config.scaling_factor
    torch.testing.assert_close(latents, teacher.pipeline.vae.encode(pictures).latent_dist.mode() * scale)
    assert teachers["ddpm"].decode(pictures) is pictures


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# x\n", "apache-2.0"),
        ('---\ntags: [a]\nlicense: "mit"  # fine\n---\n', "mit"),
        ("---\nlicense: other\nlicense_name: house-1\n---\n", "house-1"),
        ("license: mit\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_licence_is_read_from_the_cards_front_matter(tmp_path, front, licence):
    from fewstep.interop.files import licence_of

    (tmp_path / "README.md").write_text(front)
    assert licence_of(tmp_path) == licence


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A teacher of ours as a stock pipeline folder, with the network that it was written from."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = UNet(UNET)  # its zeros are gone, so that an error shows
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.05 * torch.randn_like(value))
    folder = tmp_path_factory.mktemp("own") / "small"
    check = save_teacher(
        edm(net), folder, shape=(1, 8, 8), name="small", method="denoising", licence="apache-2.0", task="digits"
    )
    return folder, net, check


def test_our_teacher_is_written_as_a_stock_pipeline_and_loads_as_it_was(own):
    folder, net, check = own
    assert check.ok
    teacher = load_teacher(folder)
    assert (teacher.name, teacher.kind, teacher.licence) == ("small", "ConsistencyModelPipeline", "apache-2.0")
    assert (teacher.classes, teacher.null_label, teacher.shape) == (3, 3, (1, 8, 8))
    assert teacher.denoiser.path == Exploding(sigma_min=0.02, sigma_max=20.0)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    assert torch.equal(teacher.denoiser(x, 1.5, labels), edm(net.eval())(x, 1.5, labels))


def test_our_teacher_needs_no_diffusers(own):
    code = (
        "import sys; from fewstep.interop import load_teacher; load_teacher(sys.argv[1]); "
        "assert 'diffusers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(own[0])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_our_teacher_loads_through_the_recorder_just_the_same(own, tmp_path):
    folder, net, _ = own
    shutil.copytree(folder, tmp_path / "plain")
    contract = json.loads((folder / "fewstep.json").read_text()) | {"network": None}
    (tmp_path / "plain" / "fewstep.json").write_text(json.dumps(contract))
    teacher = load_teacher(tmp_path / "plain")
    assert teacher.recording is not None
    assert teacher.null(torch.tensor([0])).tolist() == [3]
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 3])
    torch.testing.assert_close(teacher.denoiser(x, 1.5, labels), edm(net.eval())(x, 1.5, labels))


@pytest.mark.parametrize(
    "net",
    [
        DiT(DiTConfig(shape=(1, 8, 8), patch=4, width=16, heads=2, depth=1)),
        UNet(UNET.model_copy(update={"patch": 2})),
    ],
)
def test_a_network_without_a_stock_form_is_written_as_our_own_folder(tmp_path, net):
    check = save_teacher(
        Wrapped(net, Straight(), "velocity", "1000t"), tmp_path / "t", shape=(1, 8, 8), name="n", method="m"
    )
    assert check.ok
    assert {f.name for f in (tmp_path / "t").iterdir()} >= {"config.json", "model.safetensors", "fewstep.json"}
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(
        load_teacher(tmp_path / "t").denoiser(x, 0.5), Wrapped(net.eval(), Straight(), "velocity", "1000t")(x, 0.5)
    )


def test_a_name_that_is_neither_folder_nor_packaged_is_refused(tmp_path):
    with pytest.raises(Refused, match="no teacher 'no-such-thing'"):
        load_teacher("no-such-thing")


# -- hostile folders --------------------------------------------------------------------------------


def index(**change):
    def spoil(folder):
        value = json.loads((folder / "model_index.json").read_text())
        value.update({k: v for k, v in change.items() if v is not ...})
        for key in [k for k, v in change.items() if v is ...]:
            value.pop(key)
        (folder / "model_index.json").write_text(json.dumps(value))

    return spoil


def weights(change):
    def spoil(folder):
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, str(file), metadata={"format": "pt"})

    return spoil


def write(name, content):
    def spoil(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return spoil


def pickled(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))


def truncated(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def gone(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


FOLDERS = [
    ("a pickle", pickled, r"diffusion_pytorch_model\.bin is a pickle"),
    ("truncated weights", truncated, "truncated or no safetensors"),
    ("weights that are none", write("unet/diffusion_pytorch_model.safetensors", b"hello"), "truncated or no"),
    ("no weights", gone, "holds no safetensors weights"),
    ("no index", lambda f: (f / "model_index.json").unlink(), r"model_index\.json is missing"),
    ("an index that is no JSON", write("model_index.json", b"{"), "not valid JSON"),
    ("an index that is a list", write("model_index.json", b"[]"), "must hold a JSON object"),
    ("no class", index(_class_name=...), "names no pipeline class"),
    ("an unknown class", index(_class_name="NoSuchPipeline"), "is no pipeline of diffusers"),
    ("a class that is no pipeline", index(_class_name="UNet2DModel"), "is no pipeline of diffusers"),
    ("a class in a file", index(_class_name=["my_pipe", "MyPipe"]), "asks for custom code"),
    ("a part of another library", index(unet=["os", "system"]), "asks for custom code"),
    ("a part in a file", index(unet=["my_unet", "Net"]), "asks for custom code"),
    ("a part that leaves the folder", index(**{"../../unet": ["diffusers", "UNet2DModel"]}), "no plain name"),
    ("a part of no class", index(unet=["diffusers", "NoSuchModel"]), "does not have"),
    ("a part that is not there", index(vae=["diffusers", "AutoencoderKL"]), "is missing, though"),
    ("a part of three", index(unet=["diffusers", "UNet2DModel", "x"]), r"must be \[library, class\]"),
    ("custom code", write("unet/model.py", b"print('hello')"), r"model\.py is custom code"),
    ("code by name", write("unet/config.json", b'{"auto_map": {"AutoModel": "x.Y"}}'), "auto_map"),
    ("a config that is no JSON", write("unet/config.json", b"\xff"), "not valid JSON"),
    ("shards elsewhere", write("unet/x.safetensors.index.json", b'{"weight_map": {"a": "../../x"}}'), "no file beside"),
    ("a NaN", weights(lambda t: t["conv_in.weight"].fill_(float("nan"))), "NaN or an infinity in 'conv_in.weight'"),
    ("a missing tensor", weights(lambda t: t.pop("conv_in.bias")), "conv_in.bias"),
    ("an extra tensor", weights(lambda t: t.update(more=torch.zeros(1))), "more"),
    ("a wrong shape", weights(lambda t: t.update({"conv_in.bias": torch.zeros(3)})), "conv_in.bias"),
    ("a strange scheduler", write("scheduler/scheduler_config.json", b'{"beta_schedule": "magic"}'), "does not load"),
]  # fmt: skip


@pytest.fixture(scope="module")
def ddpm_folder(pipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "ddpm"
    pipes.ddpm().save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(("spoil", "message"), [f[1:] for f in FOLDERS], ids=[f[0] for f in FOLDERS])
def test_a_hostile_folder_is_refused_in_one_line(ddpm_folder, tmp_path, spoil, message):
    folder = tmp_path / "ddpm"
    shutil.copytree(ddpm_folder, folder)
    spoil(folder)
    with pytest.raises(Refused, match=message) as refused:
        load_teacher(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (weights(lambda t: t["conv_in.weight"].fill_(float("inf"))), "NaN or an infinity in 'conv_in.weight'"),
        (weights(lambda t: t.pop("conv_in.bias")), "lacks 'conv_in.bias'"),
        (weights(lambda t: t.update(more=torch.zeros(1))), "has 'more', which the network does not"),
        (weights(lambda t: t.update({"conv_in.bias": torch.zeros(3)})), r"has shape \[3\], the config needs \[8\]"),
        (truncated, "truncated or no safetensors"),
        (pickled, "is a pickle"),
    ],
    ids=["infinity", "missing", "extra", "shape", "truncated", "pickle"],
)
def test_a_hostile_folder_of_ours_is_refused_in_one_line(own, tmp_path, spoil, message):
    folder = tmp_path / "own"
    shutil.copytree(own[0], folder)
    spoil(folder)
    with pytest.raises(Refused, match=message) as refused:
        load_teacher(folder)
    assert "\n" not in str(refused.value)


def test_a_network_description_that_builds_nothing_is_refused(own, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(own[0], folder)
    contract = json.loads((folder / "fewstep.json").read_text())
    for network in ({"kind": "castle"}, {"kind": "unet"}, {**contract["network"], "widths": [7]}):
        (folder / "fewstep.json").write_text(json.dumps(contract | {"network": network}))
        with pytest.raises(Refused, match="network"):
            load_teacher(folder)
