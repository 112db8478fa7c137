import json
import subprocess
import sys

import pytest
import torch

from fewstep.errors import Refused
from fewstep.interop.contract import CONTRACT, Contract, Steps
from fewstep.nets import UNet, UNetConfig
from fewstep.path import Exploding, Straight, Tabulated

GOOD = Contract(
    fewstep="0.1.0",
    method="dmd2",
    prediction="cm",
    path=Exploding(sigma_min=0.02, sigma_max=20.0),
    clock="250 log_sigma",
    preconditioning={"scale_input": True, "data_std": 0.75, "boundary": 0.002},
    steps=(
        Steps(count=1, times=(2.5,), sigmas=(2.5,), call={"num_inference_steps": 1}),
        Steps(count=2, times=(2.5, 0.8), sigmas=(2.5, 0.8), policy="renoise"),
    ),
    start=2.5,
    start_scale=2.5,
    shape=(1, 8, 8),
    value_range=(-1.0, 1.0),
    classes=10,
    null_label=10,
)


def raw():
    return json.loads(json.dumps(GOOD.model_dump(mode="json")))


def test_a_contract_comes_back_from_its_file_as_it_was(tmp_path):
    GOOD.save(tmp_path)
    assert Contract.load(tmp_path) == GOOD


@pytest.mark.parametrize("path", [Straight(), Tabulated(alphas_cumprod=(0.9, 0.5, 0.1)), Exploding()])
def test_every_path_survives_the_round_trip(tmp_path, path):
    contract = GOOD.model_copy(update={"path": path, "prediction": "eps", "start": path.t_max, "steps": ()})
    contract = contract.model_copy(update={"role": "teacher"})
    contract.save(tmp_path)
    assert Contract.load(tmp_path).path == path


def test_a_contract_rebuilds_the_student_that_it_describes():
    net = UNet(UNetConfig(shape=(1, 8, 8), widths=(8, 16), groups=4, classes=10)).eval()
    student = GOOD.student(net)
    assert student.steps == {1: (2.5,), 2: (2.5, 0.8)}
    assert (student.start, student.start_scale, student.policy) == (2.5, 2.5, "renoise")
    assert student.denoiser.boundary == 0.002
    assert student.generate(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])).shape == (2, 1, 8, 8)


def test_a_step_count_without_training_is_refused_with_the_ones_there_are():
    assert GOOD.step(2).sigmas == (2.5, 0.8)
    with pytest.raises(Refused, match=r"trained for 1, 2 step\(s\), got 3"):
        GOOD.step(3)


def test_the_null_label_fills_every_row_and_its_absence_is_refused():
    assert GOOD.null(torch.tensor([1, 2])).tolist() == [10, 10]
    assert GOOD.null(None) is None
    with pytest.raises(Refused, match="cannot be guided"):
        GOOD.model_copy(update={"null_label": None}).null(torch.tensor([1]))


def change(*keys, value):
    def apply(contract):
        place = contract
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return contract

    return apply


HOSTILE = [
    (lambda c: [], "must hold a JSON object, got list"),
    (lambda c: None, "must hold a JSON object, got NoneType"),
    (lambda c: {}, "has format None"),
    (change("format", value=2), "has format 2, this version reads up to 1: upgrade"),
    (change("format", value=True), "has format True"),
    (change("format", value="1"), "has format '1'"),
    (change("strat", value=1.0), "unknown key 'strat': did you mean 'start'"),
    (change("steps", 0, "timez", value=1.0), "unknown key 'steps.0.timez': did you mean 'times'"),
    (lambda c: {k: v for k, v in c.items() if k != "prediction"}, "prediction is missing"),
    (change("prediction", value="noise"), "prediction: .*got 'noise'"),
    (change("clock", value="seconds"), "clock: .*got 'seconds'"),
    (change("path", value={"kind": "exploding", "sigma_min": -1}), "sigma_min"),
    (change("path", value={"kind": "spiral"}), "path"),
    (change("path", value={"kind": "straight"}), "needs the exploding path"),
    (change("steps", value=[]), "at least one step count"),
    (change("steps", 0, "count", value=0), "steps.0.count"),
    (change("steps", 0, "count", value=10**9), "steps.0.count"),
    (change("steps", 1, "count", value=3), "3 steps need 3 times, got 2"),
    (change("steps", 1, "times", value=[2.5, 2.5]), "times must descend"),
    (change("steps", 1, "times", value=[2.5, -1]), "times must be positive"),
    (change("steps", 1, "times", value=[2.0, 1.0]), "2 steps begin at 2, the start is 2.5"),
    (change("steps", 1, "sigmas", value=[1.0, 2.0]), "sigmas must descend"),
    (change("steps", 1, "policy", value="guess"), "policy"),
    (change("steps", 0, "call", value={"a": {"b": 1}}), "steps.0.call"),
    (change("start", value=0), "start"),
    (change("start", value=1e300), r"start must lie in \(0, 20\]"),
    (change("start", value="2,5"), "start"),
    (change("start_scale", value=-1), "start_scale"),
    (change("shape", value=[]), "shape"),
    (change("shape", value=[1, 0, 8]), "shape"),
    (change("shape", value=[60000, 60000, 60000]), "too large"),
    (change("value_range", value=[1, -1]), "value_range needs low < high"),
    (change("classes", value=-3), "classes"),
    (change("preconditioning", "data_std", value=0), "data_std"),
    (change("teacher", value={"name": "x", "sha256": "../../etc"}), "teacher.sha256"),
    (change("name", value="a\nb"), "name"),
    (change("method", value="x" * 10_000), "method"),
    (change("role", value="admin"), "role"),
]


@pytest.mark.parametrize(("spoil", "message"), HOSTILE, ids=[m for _, m in HOSTILE])
def test_a_hostile_contract_is_refused_in_one_line_that_names_the_place(tmp_path, spoil, message):
    (tmp_path / CONTRACT).write_text(json.dumps(spoil(raw())))
    with pytest.raises(Refused, match=message) as refused:
        Contract.load(tmp_path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600
    assert CONTRACT in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b'{"start": NaN}', "NaN is not a JSON number"),
        (b'{"start": -Infinity}', "-Infinity is not a JSON number"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * (9 * 2**20), "more than the"),
    ],
    ids=["empty", "open", "binary", "nan", "infinity", "deep", "huge number", "huge file"],
)
def test_a_file_that_is_no_json_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / CONTRACT).write_bytes(content)
    with pytest.raises(Refused, match=message) as refused:
        Contract.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_missing_contract_is_refused_by_its_name(tmp_path):
    with pytest.raises(Refused, match=r"fewstep\.json is missing"):
        Contract.load(tmp_path)


def test_a_table_of_alphas_that_rises_is_refused():
    value = raw() | {"prediction": "eps", "clock": "index", "start": 1.0, "start_scale": 1.0}
    value["steps"] = [{"count": 1, "times": [1.0], "sigmas": [1.0]}]
    for table, fine in (([0.9, 0.5], True), ([0.5, 0.9], False), ([2.0, 0.5], False)):
        value["path"] = {"kind": "tabulated", "alphas_cumprod": table}
        if fine:
            Contract.parse(value)
        else:
            with pytest.raises(Refused, match="alphas_cumprod must fall"):
                Contract.parse(value)


def test_a_contract_is_checked_without_diffusers():
    code = (
        "import sys; from fewstep.interop import Contract; import fewstep.interop; "
        "names = {m.split('.')[0] for m in sys.modules}; "
        "assert not names & {'diffusers', 'transformers', 'sklearn', 'matplotlib', 'PIL'}, names"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
