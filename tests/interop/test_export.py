import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import jobs
from fewstep.cli import main
from fewstep.denoiser import Wrapped
from fewstep.errors import Failed, Refused
from fewstep.interop import Contract, load_student, load_teacher, save_student
from fewstep.interop import export as module
from fewstep.interop.export import export_lora, export_pipeline, export_programs
from fewstep.interop.program import Draws
from fewstep.nets import MLP, MLPConfig, UNet, UNetConfig
from fewstep.path import Exploding, Straight
from fewstep.student import Student

BATCHES = (1, 3, 64)


@pytest.fixture
def inside(monkeypatch):
    """Compare in this process: the same script without the start-up time."""
    spec = importlib.util.spec_from_file_location("golden_program_script", module.SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def compare(folder, cases, timeout):
        found = script.compare(str(folder), [str(case) for case in cases])
        return {name: {int(n): e for n, e in errors.items()} for name, errors in found.items()}

    monkeypatch.setattr(module, "_fresh_process", compare)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A flow on an MLP with labels, of one and two steps, with what a teacher's folder may carry."""
    torch.manual_seed(0)
    net = MLP(MLPConfig(shape=(2,), width=16, depth=1, classes=3))
    student = Student(Wrapped(net, Straight(), "velocity", "1000t"), (2,), steps={1: (1.0,), 2: (1.0, 0.5)})
    folder = tmp_path_factory.mktemp("flow") / "run" / "student"
    save_student(
        student, folder, method="meanflow", name="two numbers", licence="openrail++", value_range=(-1.0, 1.0),
        program=False,
    )  # fmt: skip
    (folder / "LICENSE.md").write_text("be kind")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A consistency U-Net in the stock pipeline, of one and two steps."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = UNet(UNetConfig(shape=(1, 8, 8), widths=(8, 16), groups=4, classes=3))
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.05 * torch.randn_like(value))
    path = Exploding(sigma_min=0.02, sigma_max=20.0)
    one = Wrapped(net, path, "cm", "250 log_sigma", scale_input=True, data_std=0.75)
    student = Student(one, (1, 8, 8), start=2.5, steps={1: (2.5,), 2: (2.5, 0.8)}, policy="renoise")
    folder = tmp_path_factory.mktemp("stock") / "student"
    save_student(student, folder, method="dmd2", licence="mit")
    return folder


def same(program, student, steps, labels=True, count=5):
    """The largest distance of a program from the student on noise that no export has seen."""
    rng = torch.Generator().manual_seed(77)
    noise, *draws = [torch.randn(count, *student.shape, generator=rng) for _ in range(steps)]
    named = {"labels": torch.arange(count) % 3} if labels else {}
    wanted = student.generate(noise, named.get("labels"), Draws(draws), steps)
    if student.policy == "renoise":
        named |= {f"noise_{i + 2}": draw for i, draw in enumerate(draws)}
    return float((program(noise, named) - wanted).abs().max())


# -- programs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_flow_becomes_a_pt2_program_for_each_step_count(flow, tmp_path):
    done = export_programs(flow, tmp_path / "e", "pt2", batches=BATCHES)  # in a real fresh process
    assert done.files == ("model_1step.pt2", "model_2step.pt2")
    assert all(set(found) == {4, *BATCHES} for found in done.errors.values())
    assert 0 <= done.max_error <= 1e-5
    student = load_student(flow).student
    for steps in (1, 2):
        extra = {"fewstep.json": ""}
        held = torch.export.load(str(tmp_path / "e" / f"model_{steps}step.pt2"), extra_files=extra)
        assert Contract.parse(json.loads(extra["fewstep.json"])).name == "two numbers"
        program = held.module()
        assert same(lambda noise, named, run=program: run(noise, **named), student, steps) <= 1e-5
    assert {f.name for f in (tmp_path / "e").iterdir()} == {
        "model_1step.pt2", "model_2step.pt2", "program.json", "golden.safetensors", "fewstep.json", "README.md",
        "LICENSE.md", "safety_checker",
    }  # fmt: skip
    card = (tmp_path / "e" / "README.md").read_text()
    assert 'license: "openrail++"' in card and "safety_checker" in card
    contract = Contract.load(tmp_path / "e")
    assert (contract.program, contract.licence, contract.pipeline) == ("model_1step.pt2", "openrail++", None)
    code = card.split("```python\n")[1].split("```")[0].replace('"model_', f'"{tmp_path}/e/model_')
    space = {}
    exec(code, space)
    assert space["samples"].shape == (4, 2)


@pytest.mark.slow
def test_a_consistency_unet_that_renoises_becomes_an_onnx_program(stock, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    done = export_programs(stock, tmp_path / "e", "onnx", steps=2, batches=BATCHES)  # in a real fresh process
    assert done.files == ("model_2step.onnx",)
    assert done.max_error <= 1e-5
    file = str(tmp_path / "e" / "model_2step.onnx")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [
        ("noise", ["batch", 1, 8, 8]), ("labels", ["batch"]), ("noise_2", ["batch", 1, 8, 8]),
    ]  # fmt: skip
    held = {p.key: p.value for p in onnx.load(file).metadata_props}
    assert (held["fewstep.steps"], held["fewstep.method"], held["modelspec.license"]) == ("2", "dmd2", "mit")

    def run(noise, named):
        given = {"noise": noise.numpy(), **{k: v.numpy() for k, v in named.items()}}
        return torch.from_numpy(session.run(None, given)[0])

    assert same(run, load_student(stock).student, 2) <= 1e-5


@pytest.mark.slow
def test_a_recorded_diffusers_unet_becomes_a_program_for_64_rows_and_more(pipes, tmp_path, inside):
    pipes.ddpm().save_pretrained(str(tmp_path / "teacher"))
    teacher = load_teacher(tmp_path / "teacher")
    student = Student.like(teacher.denoiser, teacher.shape, steps={1: (1.0,), 2: (1.0, 0.5)})
    save_student(student, tmp_path / "s", teacher=teacher, method="test")
    done = export_programs(tmp_path / "s", tmp_path / "e", "pt2", steps=2, batches=(1, 64, 70))
    assert done.files == ("model_2step.pt2",)
    assert done.max_error <= 1e-5
    assert set(done.errors["model_2step.pt2"]) == {1, 4, 64, 70}


@pytest.mark.slow
def test_a_latent_student_is_exported_with_its_decoder_and_then_gives_pixels(pipes, tmp_path, inside, here):
    pipes.dit().save_pretrained(str(tmp_path / "teacher"))
    teacher = load_teacher(tmp_path / "teacher")
    student = Student.like(teacher.denoiser, teacher.shape)
    save_student(student, tmp_path / "s", teacher=teacher, method="test")
    done = export_programs(tmp_path / "s", tmp_path / "e", "pt2", batches=(1, 64), decode=True)
    assert done.max_error <= 1e-5
    golden = load_file(tmp_path / "e" / "golden.safetensors")
    assert golden["noise"].shape[1:] == (2, 4, 4)
    loaded = load_student(tmp_path / "s")
    pixels = loaded.decode(loaded.student.generate(golden["noise"], golden["labels"]))
    torch.testing.assert_close(golden["output_1"], pixels, rtol=1e-5, atol=1e-5)
    assert pixels.shape[1] == 3


@pytest.mark.slow
def test_a_student_of_a_mixture_is_exported_by_the_command_line(tmp_path, capsys, inside):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    path = Exploding(sigma_min=0.02, sigma_max=20.0)
    net = MLP(MLPConfig(shape=(2,), width=8, depth=1))
    student = Student(Wrapped(net, path, "cm", "250 log_sigma", scale_input=True), (2,))
    save_student(student, tmp_path / "run" / "student", method="regression", program=False)
    assert main(["export", str(tmp_path / "run"), "--to", "onnx", "--json", "--batch", "1,3"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"] == ["model_1step.onnx"]
    assert (tmp_path / "run" / "export" / "onnx" / "model_1step.onnx").is_file()
    assert answer["max_error"] <= 1e-5


def shaken(program, cond=None, plain=module.traced):
    with torch.no_grad():
        next(program.net.parameters()).mul_(1.01)
    return plain(program, cond)


@pytest.mark.slow
def test_a_program_with_other_weights_is_refused_and_leaves_nothing_behind(flow, tmp_path, monkeypatch, inside):
    class Copied(module.Program):
        def __init__(self, student, *rest):
            super().__init__(student, *rest)
            self.net = __import__("copy").deepcopy(self.net)

    monkeypatch.setattr(module, "Program", Copied)
    monkeypatch.setattr(module, "traced", shaken)
    with pytest.raises(Failed, match=r"model_1step\.pt2 differs from the student by .* nothing was written"):
        export_programs(flow, tmp_path / "out" / "e", "pt2", steps=1, batches=(1,))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_program_that_does_not_run_elsewhere_leaves_nothing_behind(flow, tmp_path, monkeypatch):
    script = tmp_path / "dies.py"
    script.write_text("raise SystemExit('no luck today')")
    monkeypatch.setattr(module, "SCRIPT", script)
    with pytest.raises(Failed, match="no luck today"):
        export_programs(flow, tmp_path / "out" / "e", "pt2", steps=1)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 7}, r"trained for 1, 2 step\(s\), got 7"),
        ({"decode": True}, "no autoencoder"),
        ({"batches": (0,)}, "whole numbers from 1"),
        ({"kind": "torchscript"}, "one of onnx, pt2"),
    ],
)
def test_what_cannot_be_a_program_is_refused_before_anything_is_written(flow, tmp_path, options, message):
    with pytest.raises(Refused, match=message):
        export_programs(flow, tmp_path / "out" / "e", **{"kind": "pt2", **options})
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_folder_that_is_there_is_not_overwritten_unasked(flow, tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(Refused, match="exists"):
            export_programs(flow, tmp_path / "e", "pt2", overwrite=overwrite)
    assert (tmp_path / "e" / "mine.txt").read_text() == "mine"


def test_a_teacher_is_refused(tmp_path):
    from fewstep.interop import packaged

    with pytest.raises(Refused, match="distil it first"):
        export_programs(packaged()["digits"], tmp_path / "e", "pt2")


# -- pipelines --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stock_student_is_copied_with_its_contract_and_without_what_is_not_its_own(stock, tmp_path):
    messy = tmp_path / "messy"
    shutil.copytree(stock, messy)
    (messy / "notes").mkdir()
    (messy / "notes" / "diary.txt").write_text("dear diary")
    (messy / "LICENSE").write_text("be kind")
    done = export_pipeline(messy, tmp_path / "e", batches=(1, 5))
    assert done.errors == {"ConsistencyModelPipeline": {1: 0.0, 5: 0.0}}
    assert {f.name for f in (tmp_path / "e").iterdir()} == {
        "model_index.json", "unet", "scheduler", "fewstep.json", "golden.safetensors", "README.md", "LICENSE",
    }  # fmt: skip


def test_a_stock_student_whose_weights_were_changed_is_not_exported(stock, tmp_path, here):
    broken = tmp_path / "broken"
    shutil.copytree(stock, broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.weight"] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Failed, match="does not give the student's samples"):
        export_pipeline(broken, tmp_path / "out" / "e")
    assert not list((tmp_path / "out").iterdir())


def test_a_network_that_no_pipeline_runs_is_refused_with_what_would_work(flow, tmp_path):
    with pytest.raises(Refused, match="take --to pt2 or --to onnx"):
        export_pipeline(flow, tmp_path / "e")


def test_a_student_without_adapters_has_no_lora(flow, tmp_path):
    for names in ("diffusers", "kohya"):
        with pytest.raises(Refused, match="LoRA"):
            export_lora(flow, tmp_path / "out" / "e", names)
    assert not list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True


@pytest.mark.slow
def test_a_lora_file_is_what_the_student_has_learned(pipes, tmp_path, here):
    lora = pytest.importorskip("fewstep.adapters")
    pipes.ddpm().save_pretrained(str(tmp_path / "teacher"))
    teacher = load_teacher(tmp_path / "teacher")
    options = lora.LoraOptions(rank=2, alpha=1.0, targets="all")
    student = Student(lora.adapted(teacher.denoiser, options), teacher.shape)
    with torch.no_grad():
        for name, value in student.named_parameters():
            if name.endswith("lora_up"):
                value.normal_(std=0.05)
    save_student(student, tmp_path / "s", teacher=teacher, method="dmd2")
    done = export_lora(tmp_path / "s", tmp_path / "e", "diffusers")
    tensors = load_file(tmp_path / "e" / done.files[0])
    weights = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(tmp_path / "teacher" / weights), load_file(tmp_path / "s" / weights)
    downs = [name for name in tensors if name.endswith(".lora_A.weight")]
    assert downs
    for name in downs:
        layer = name.removeprefix("unet.").removesuffix(".lora_A.weight")
        up = tensors[name.replace("lora_A", "lora_B")]
        learned = (up.flatten(1) @ tensors[name].flatten(1)).view(before[f"{layer}.weight"].shape)
        assert learned.abs().max() > 1e-3
        moved = after[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close(moved, learned, rtol=1e-4, atol=1e-6)
    assert export_lora(tmp_path / "s", tmp_path / "k", "kohya").files != done.files
    assert Contract.load(tmp_path / "e").method == "dmd2"


# -- the job and the command ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "torchscript"], "diffusers, lora, kohya, onnx, pt2"),
        (["--to", "pt2", "--batch", "0"], "whole numbers from 1"),
        (["--to", "pt2", "--batch", "many"], "whole numbers from 1"),
        (["--to", "kohya", "--steps", "1"], "--steps is for programs"),
        (["--to", "diffusers", "--decode"], "--decode is for programs"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_code_2(flow, tmp_path, capsys, arguments, message):
    assert main(["export", str(flow), "--out", str(tmp_path / "e"), *arguments]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    assert not (tmp_path / "e").exists()


def test_a_folder_of_programs_is_not_run_by_check(flow, tmp_path):
    Contract.load(flow).save(tmp_path)
    (tmp_path / "program.json").write_text("{}")
    with pytest.raises(Refused, match="can hold code"):
        jobs.check(tmp_path)
