"""The commands, in the order of the work: each is a thin caller of ``jobs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..errors import Refused
from ..machine import examine, pick_device, set_threads
from ..screen import Screen, lines_of, plan_text, report_text, table
from .asked import chosen_recipe, existing, labels_of, licence_accepted, recipe_of, run_folder, sizes_of
from .frame import app, command, decided, resumable, stoppable

# what a person may set on any command
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; errors and the result only.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Warnings (-v), tracebacks (-vv).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Seed = Annotated[int | None, typer.Option(help="Seed of every random draw [default: the recipe's].")]
Threads = Annotated[
    int | None, typer.Option(envvar="FEWSTEP_THREADS", min=1, help="CPU threads [default: one per physical core].")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Changes to the recipe, e.g. optim.lr=1e-3.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write.")]
Accept = Annotated[
    bool, typer.Option("--accept-licence", help="Go on although the teacher's licence forbids something.")
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Turn a slow multi-step generator into one that answers in one step, and show what that cost.

    \b
    Start here:
      fewstep distill digits             a teacher, a one-step student, a table, a report
      fewstep list methods               what there is
      fewstep distill ./my-pipeline --data ./images --method dmd2
    """
    if version:
        print(f"fewstep {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@command
def _list(
    kind: Annotated[str, typer.Argument(metavar="methods|papers|recipes|samplers|tasks|metrics")] = "methods",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Show what there is, with its tier and the highest level of evidence for it.

    Levels: exact (proven on a law known in closed form), small (a recipe on small images holds its bar),
    gpu (run at scale), paper (a published figure reproduced), none.

    \b
    Examples:
      fewstep list methods
      fewstep list papers --json
    """
    from ..catalogue import rows_of

    rows = rows_of(kind)
    shown = [key for key in rows[0] if key != "file"] if rows else []
    Screen(quiet, verbose, json).result(rows, table(shown, [[row[key] for key in shown] for row in rows]))


@command
def init(
    name: Annotated[str, typer.Argument(metavar="RECIPE|METHOD", help="A recipe that ships, or a method.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write [default: NAME.toml]; - is stdout.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write a commented recipe to start from: a copy of one that ships, or every option of a method.

    \b
    Examples:
      fewstep init digits -o mine.toml
      fewstep init meanflow
    """
    from ..registry import METHODS, nearest
    from ..template import recipe_text
    from ..train.recipe import shipped

    recipes, methods = shipped(), [entry.name for entry in METHODS]
    if name not in recipes and name not in methods:
        raise Refused(f"unknown recipe or method {name!r}: {nearest(name, [*recipes, *methods])}")
    text = recipes[name].read_text(encoding="utf-8") if name in recipes else recipe_text(name)
    if str(out) == "-":
        sys.stdout.write(text)
        return
    file = out or Path(f"{name}.toml")
    if file.exists():
        raise Refused(f"{file} is already there: name another file with -o")
    file.write_text(text, encoding="utf-8")
    Screen(quiet, verbose, json).result({"file": file}, f"wrote {file}; next: fewstep plan {file}")


Teacher = Annotated[
    str, typer.Argument(metavar="TEACHER|RECIPE", help="A name, a diffusers folder, a recipe file, a run.")
]
Data = Annotated[
    Path | None,
    typer.Option(help="Pictures for a diffusers teacher: a folder, .npz, .zip, .tar, .parquet (docs/data.md)."),
]
Lora = Annotated[
    int | None, typer.Option(min=1, metavar="RANK", help="Train adapters of this rank on the teacher's own weights.")
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="Prompts of a text pipeline, one a line: no images are needed.")
]
MethodName = Annotated[
    str | None, typer.Option("--method", help="A method's name, ./mine.py:MyMethod, or auto (it says why).")
]
Minutes = Annotated[float | None, typer.Option(min=0.1, help="With --method auto: of training, on this device.")]


@command
def plan(
    what: Teacher,
    overrides: Overrides = None,
    data: Data = None,
    prompts: PromptFile = None,
    method: MethodName = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0.01, metavar="GIB", help="Of the device to plan for [default: this one's]."),
    ] = None,
    minutes: Minutes = None,
    lora: Lora = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Check a recipe and predict parameters, memory and time, without training.

    Also: what would make it fit where it does not, and the licences that the student inherits.

    \b
    Examples:
      fewstep plan digits
      fewstep plan mine.toml steps=2000 optim.lr=1e-3
      fewstep plan mine.toml --memory 24
      fewstep plan digits --method auto --memory 0.5
    """
    screen, place = Screen(quiet, verbose, json), pick_device(device)
    set_threads(threads)
    budget = {"memory": memory if method == "auto" else None, "minutes": minutes}
    recipe, chosen = chosen_recipe(what, overrides, seed, data, method, lora, prompts, place, budget)
    from .. import jobs

    result = jobs.plan(recipe, device=place, memory=memory, chosen=chosen)
    screen.result(result, plan_text(result))


@command
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, the name of one that ships, or a run to resume.")],
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    accept_licence: Accept = False,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Train by a recipe and save the model; no evaluation. This is how teachers are made.

    \b
    Examples:
      fewstep train digits_teacher
      fewstep train mine.toml steps=2000 --out runs/mine
      fewstep train runs/mine --resume
    """
    screen, place = Screen(quiet, verbose, json), pick_device(device)
    run = decided(lambda: run_folder(recipe, out, resume))
    chosen = recipe_of(recipe, overrides, seed)
    from .. import jobs

    set_threads(threads)
    agreed = licence_accepted(chosen, run, accept_licence, resume)
    with screen, resumable("train", run):
        result = jobs.train(chosen, run, resume=resume, device=place, watch=screen, accept_licence=agreed)
    screen.result({"run": run, **result}, f"{lines_of(result)}\nrun: {run}")


@command
def distill(
    what: Teacher,
    overrides: Overrides = None,
    data: Data = None,
    prompts: PromptFile = None,
    method: MethodName = None,
    memory: Annotated[
        float | None, typer.Option(min=0.01, metavar="GIB", help="With --method auto: to stay within.")
    ] = None,
    minutes: Minutes = None,
    lora: Lora = None,
    out: Out = None,
    resume: Resume = False,
    accept_licence: Accept = False,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Distil a teacher into a few-step student, measure both, write the report.

    The run folder (runs/NAME) gets the student, ready for plain diffusers, and report/index.html.

    \b
    Examples:
      fewstep distill digits
      fewstep distill ./my-pipeline --data ./images --method dmd2
      fewstep distill ./my-pipeline --data ./images --method auto --memory 24 --minutes 60
      fewstep distill ./my-pipeline --data ./images --method dmd2 --lora 32
      fewstep distill ./my-pipeline --prompts prompts.txt
      fewstep distill mine.toml optim.lr=1e-3 --out runs/faster
      fewstep distill runs/faster --resume
      fewstep distill digits --method ./mine.py:MyMethod
    """
    screen, place = Screen(quiet, verbose, json), pick_device(device)
    run = decided(lambda: run_folder(what, out, resume))
    set_threads(threads)
    begun = resume and method == "auto" and (run / "recipe.toml").exists()  # it says what was chosen
    budget = {"memory": None if begun else memory, "minutes": None if begun else minutes}
    recipe, chosen = chosen_recipe(
        str(run) if begun else what, overrides, seed, None if begun else data, None if begun else method, lora,
        None if begun else prompts, place, budget,
    )  # fmt: skip
    from .. import jobs

    agreed = licence_accepted(recipe, run, accept_licence, resume)
    with screen, resumable("distill", run):
        report = jobs.distill(
            recipe, run, resume=resume, device=place, watch=screen, accept_licence=agreed, chosen=chosen
        )
    page = run / "report" / "index.html"
    screen.result({"run": run, **report}, report_text(report, page if page.is_file() else None) or f"run: {run}")


@command
def search(
    model: Annotated[str, typer.Argument(metavar="TEACHER", help="A name, a diffusers folder, or a teacher folder.")],
    nfe: Annotated[int, typer.Option(help="Calls of the network that the plan makes.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the plan.")] = Path("plan.json"),
    objective: Annotated[
        str, typer.Option(help="auto, features, distance, frechet, or FILE.py:FUNCTION of your own (lower is better).")
    ] = "auto",
    how: Annotated[
        str, typer.Option(help="auto (evolution, then gradient), evolution, gradient, cma or tpe.")
    ] = "auto",
    budget: Annotated[int, typer.Option(help="Candidates that are scored.")] = 300,
    starts: Annotated[int, typer.Option(help="Starts to search on, and as many unseen ones for the verdict.")] = 256,
    reference: Annotated[
        str | None, typer.Option(help="Real data that samples are held to: a task's name, a folder or an .npz file.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Scale at which the plan will be used.")] = 1.0,
    keep: Annotated[float, typer.Option(help="Leave blocks out until this share of the FLOPs is left.")] = 1.0,
    prompts: PromptFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search that was stopped.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same plan.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Find the best sampler of a few calls for a teacher, without training.

    Candidates are schedules of levels, orders, predictions and weights. All see the same starts; the plan is
    compared with every fixed sampler on starts that nothing was chosen on, and is never worse there. Weights are
    fitted by gradient where the network lets one through. cma and tpe need the extra "search".

    
    Examples:
      fewstep search digits --nfe 4
      fewstep search ./my-pipeline --nfe 5 -o plan.json
      fewstep search ./my-pipeline --nfe 8 --prompts prompts.txt --guidance 5
      fewstep search digits --nfe 4 --objective ./mine.py:score
      fewstep search digits --nfe 4 --keep 0.9
      fewstep sample digits --plan plan.json
    """
    screen, place = Screen(quiet, verbose, json), pick_device(device)
    from .. import jobs
    from ..jobs.searching import table_of

    set_threads(threads)
    with screen, stoppable(out.with_name(f"{out.name}.search"), lambda: "the same command with --resume"):
        result = jobs.search(
            model, nfe, out=out, objective=objective, how=how, budget=budget, starts=starts, guidance=guidance,
            reference=reference, keep=keep, prompts=prompts, seed=seed, resume=resume, device=place, watch=screen,
        )  # fmt: skip
    screen.result(result, f"{table(*table_of(result))}\n\n{result['line']}")


@command
def sample(
    model: Annotated[str, typer.Argument(help="A student folder, a run, or a teacher: its folder or its name.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many samples.")] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="Calls per sample [default: the student's first].")] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A plan of fewstep search: how the teacher is sampled.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Labels, repeated in turn, e.g. 3 or 0,1,2.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")] = Path("samples"),
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Draw samples from a student or a teacher.

    \b
    Examples:
      fewstep sample runs/digits/student --count 100 --out samples
      fewstep sample runs/digits/student --labels 3,7 --seed 1
      fewstep sample digits --steps 8
      fewstep sample digits --plan plan.json
    """
    screen, place = Screen(quiet, verbose, json), pick_device(device)
    wanted = labels_of(labels)
    from .. import jobs

    set_threads(threads)
    files = jobs.sample(Path(model), count, steps=steps, seed=seed, labels=wanted, out=out, device=place, plan=plan)
    screen.result({"files": files}, f"{len(files)} file{'s' if len(files) != 1 else ''} in {out}")


@command
def evaluate(
    student: Annotated[Path, typer.Argument(help="A student folder or a run.")],
    against: Annotated[str, typer.Option(help="The teacher: a name or a diffusers folder.")],
    reference: Annotated[
        str | None, typer.Option(help="Held-out real data: a task's name, a folder or an .npz file.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Instead of data: a text file, one prompt a line; the teacher is the reference.")
    ] = None,
    scorer: Annotated[
        Path | None, typer.Option(help="With --prompts: a local CLIP folder that scores how prompts are obeyed.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="With --prompts: a local CLIP or DINO folder that measures likeness.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")] = Path("evaluation"),
    seed: Annotated[int, typer.Option(help="First seed of the noise.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Measure a student against its teacher and against real data, by the one protocol; or without data, on prompts.

    \b
    Examples:
      fewstep evaluate runs/digits/student --against digits --reference digits
      fewstep evaluate runs/mine/student --against ./my-pipeline --prompts prompts.txt
    """
    if (reference is None) == (prompts is None):
        raise Refused("give either --reference (real data) or --prompts (a text file, where there is none)")
    if prompts is None and (scorer or features):
        raise Refused("--scorer and --features go with --prompts")
    screen, place = Screen(quiet, verbose, json), pick_device(device)
    from .. import jobs

    set_threads(threads)
    with screen:
        if reference is None:
            assert prompts is not None
            report = jobs.evaluate_prompts(
                existing(student), against, existing(prompts), out, scorer=scorer, features=features, seed=seed,
                device=place, watch=screen,
            )  # fmt: skip
        else:
            report = jobs.evaluate(existing(student), against, reference, out, seed=seed, device=place, watch=screen)
    screen.result(report, report_text(report, out))


@command
def compare(
    models: Annotated[list[Path], typer.Argument(help="Students or runs.")],
    reference: Annotated[str, typer.Option(help="Held-out real data: a task's name, a folder or an .npz file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")] = Path("comparison"),
    seed: Annotated[int, typer.Option(help="First seed of the noise.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Measure several students side by side, from the same noise.

    \b
    Examples:
      fewstep compare runs/digits runs/digits-2 --reference digits
    """
    screen, place = Screen(quiet, verbose, json), pick_device(device)
    from .. import jobs

    set_threads(threads)
    with screen:
        report = jobs.compare(
            [existing(model) for model in models], reference, out, seed=seed, device=place, watch=screen
        )
    screen.result(report, report_text(report, out))


@command
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    votes: Annotated[
        list[Path] | None, typer.Option(help="Votes from the run's report/ab.html, one file a person.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write a run's report again, from what its folder holds; with votes, say what people preferred.

    \b
    Examples:
      fewstep report runs/digits
      fewstep report runs/mine --votes votes.json
    """
    from .. import jobs

    file = jobs.report(existing(run), votes or [])
    Screen(quiet, verbose, json).result({"report": file}, f"report: {file}")


@command
def verify(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...|all [KEY.SUB=VALUE]...", help="Recipes that state what they [expect]."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the runs; finished ones are not run again.")
    ] = Path("runs/verify"),
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds [default: the recipe's].")] = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Run recipes over their seeds and hold the scores to what they promise; exit 1 where one misses.

    \b
    Examples:
      fewstep verify digits
      fewstep verify digits steps=200 --seeds 1
      fewstep verify all
    """
    screen, place = Screen(quiet, verbose, json), pick_device(device)
    from ..train.recipe import load_recipe, shipped

    changes = [text for text in recipes if "=" in text]
    names = [text for text in recipes if "=" not in text]
    if names == ["all"]:
        names = [name for name in shipped() if load_recipe(name).expect]
    from .. import jobs

    set_threads(threads)
    with screen:
        result = jobs.verify(names, out, seeds=seeds, device=place, watch=screen, overrides=changes)
    rows = result["rows"]
    shown = list(rows[0]) if rows else []
    screen.result(result, table(shown, [[row[key] for key in shown] for row in rows]))
    if not result["holds"]:
        raise typer.Exit(1)


@command
def export(
    model: Annotated[Path, typer.Argument(help="A student folder or a run.")],
    to: Annotated[str, typer.Option(help="diffusers, lora, kohya, onnx or pt2.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write [default: export/TO beside the student].")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="One step count [default: a program for each that was trained].")
    ] = None,
    batch: Annotated[str, typer.Option(help="Numbers of rows at which it is compared with the student.")] = "1,3,64",
    decode: Annotated[bool, typer.Option("--decode", help="Put the autoencoder's decoder into the program.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export at --out.")] = False,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Take a student elsewhere; nothing is written that does not give the student's own samples.

    diffusers: a pipeline folder for plain diffusers. lora, kohya: the adapters alone, by diffusers' names or by
    those that ComfyUI and the web interfaces read. onnx, pt2: the whole sampler as one program a step count, noise in
    and sample out, for any number of rows; it runs without this package (onnxruntime, or torch alone).

    \b
    Before the folder gets its name, the export draws from the golden noise and from other noise in a fresh
    process, and must agree to 1e-5. A large network is compared faster with few rows: --batch 1,2.

    \b
    Examples:
      fewstep export runs/digits --to onnx
      fewstep export runs/digits/student --to pt2 --steps 1 --out digits-program
      fewstep export ./my-student --to diffusers --out ./my-pipeline
      fewstep export ./my-student --to kohya
    """
    screen = Screen(quiet, verbose, json)
    sizes = sizes_of(batch)
    from .. import jobs

    set_threads(threads)
    with screen:
        result = jobs.export(
            existing(model), to, out=out, steps=steps, batches=sizes, decode=decode, overwrite=overwrite, watch=screen
        )
    screen.result(result, lines_of(result))


@command
def check(
    student: Annotated[Path, typer.Argument(help="A student folder or a run.")],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Check a student folder: its contract, and its golden sample drawn again; exit 1 where one fails.

    \b
    Examples:
      fewstep check runs/digits/student
    """
    from .. import jobs

    result = jobs.check(existing(student))
    Screen(quiet, verbose, json).result(result, lines_of(result))
    if not result["holds"]:
        raise typer.Exit(1)


@command
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A student folder, a run or a teacher: are 16 bits enough for it?")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Look at this machine: versions, extras, devices, how many threads pay, packages that harm each other.

    With a model, also whether 16 bits are enough for it: how far the law of its samples moves in bfloat16, beside
    how much two draws of it differ.

    \b
    Examples:
      fewstep doctor
      fewstep doctor --json
      fewstep doctor runs/digits/student
    """
    drift = None
    if model is not None:
        from .. import jobs

        drift = jobs.bits(model)
    facts = examine()
    if drift is not None:
        facts["precision"] = drift
    shown = dict(facts)
    shown["extras"] = {
        name: f"missing {', '.join(missing)}: pip install 'fewstep[{name}]'" if missing else "installed"
        for name, missing in facts["extras"].items()
    }
    threads = facts["threads"]
    shown["threads"] = {
        **{
            f"{count} thread{'s' if count != '1' else ''}": f"{ms} ms per small training step"
            for count, ms in threads["ms_per_step"].items()
        },
        "advice": threads["advice"],
    }
    if drift is not None:
        shown["precision"] = drift["line"]
    warnings = shown.pop("warnings")
    text = "\n".join([lines_of(shown), *(f"warning: {line}" for line in warnings)])
    Screen(quiet, verbose, json).result(facts, text)
