"""The command `hf-slim`: parse and print, nothing else.

    hf-slim methods                        what there is
    hf-slim inspect MODEL                  layers, shapes, bytes by kind, tied weights; on demand what could go
    hf-slim plan RECIPE                    what would happen to every layer; no weights are loaded
    hf-slim run RECIPE --out DIR           do it
    hf-slim eval MODEL                     perplexity, accuracy, agreement, speed
    hf-slim card DIR                       the model card of an artifact

Every command takes --json. Recipes take overrides: `hf-slim run r.yaml --model M --out D seed=1 quantize.gptq.bits=3`.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console, RenderableType
from transformers.utils import logging as transformers_logging

import hf_slim
from hf_slim.core.data import DataSource, load_tokens, tokens_from
from hf_slim.core.errors import DataError, PlanError, SlimError
from hf_slim.core.examples import load_examples
from hf_slim.core.model import ModelSource
from hf_slim.core.parallel import device, is_main
from hf_slim.core.progress import Progress
from hf_slim.core.report import RunReport
from hf_slim.core.tables import make_table
from hf_slim.evaluation.measure import measure
from hf_slim.export.artifact import read_report
from hf_slim.export.card import model_card
from hf_slim.export.table import stage_seconds, summary
from hf_slim.insight.plots import plot_folder
from hf_slim.insight.sensitivity import SensitivityInsight
from hf_slim.inspect import INSIGHTS, inspect_model, look_into
from hf_slim.methods import addresses, find_method
from hf_slim.methods import summary as first_words
from hf_slim.plan import Plan, make_plan
from hf_slim.recipe import Recipe, load_recipe
from hf_slim.run import run_recipe

WIDTH = 80
MOST_SENSITIVE = 20  # layers that are shown, unless all are asked for


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 when the input cannot be used (the message says why); 2 for a wrong command line; 130 when interrupted.
    """
    arguments = _parse(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        result = arguments.run(arguments)
    except SlimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        return 0
    if arguments.json and is_main():
        print(json.dumps(result, indent=1))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand after options too, which argparse alone does not allow."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-slim", description="Make HuggingFace Transformers models smaller.")
    parser.add_argument("--version", action="version", version=f"hf_slim {hf_slim.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _command(commands, "methods", _methods, "list the methods: family, what each needs, paper")

    inspect = _command(commands, "inspect", _inspect, "layers, shapes, parameters and bytes of a model")
    inspect.add_argument("model", help="Hub id, local folder or GGUF file")
    inspect.add_argument("--layers", action="store_true", help="one line a layer")
    _insight_arguments(inspect)

    plan = _command(commands, "plan", _plan, "what a recipe would do to every layer; loads no weights")
    _recipe_arguments(plan)
    plan.add_argument("--layers", action="store_true", help="one line a layer")

    run = _command(commands, "run", _run, "carry out a recipe; an interrupted run is taken up")
    _recipe_arguments(run)
    run.add_argument("--out", required=True, help="folder of the artifact")
    run.add_argument("--overwrite", action="store_true", help="throw away what an earlier run left in --out")

    evaluate = _command(commands, "eval", _eval, "perplexity or accuracy of a model; agreement and speed on demand")
    evaluate.add_argument("model", help="Hub id, local folder or GGUF file")
    evaluate.add_argument("--original", help="compare with this model: KL and top-1 agreement")
    evaluate.add_argument("--speed", action="store_true", help="measure prefill and decode speed too")
    evaluate.add_argument(
        "--data", default="builtin", help="text: builtin, a txt/jsonl/csv/tsv/parquet file, or a Hub data set"
    )
    evaluate.add_argument("--column", help="column of the text (default text)")
    evaluate.add_argument("--label", help="column of the classes, for the accuracy of a classifier")
    evaluate.add_argument("--samples", type=int, default=16, help="windows or labelled texts (default 16)")
    evaluate.add_argument("--length", type=int, default=512, help="tokens in a window (default 512)")

    card = _command(commands, "card", _card, "print the model card of an artifact")
    card.add_argument("folder", help="folder that `hf-slim run` wrote")
    return parser


def _command(commands: Any, name: str, run: Any, what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1 or quantize.gptq.bits=3")
    parser.add_argument("--model", help="Hub id, local folder or GGUF file; instead of the recipe's")


def _insight_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what could go (loads the weights)")
    group.add_argument("--weights", action="store_true", help="how many weights are small, by kind of layer")
    group.add_argument("--activations", action="store_true", help="APoZ and contribution of MLP neurons, on text")
    group.add_argument("--sensitivity", action="store_true", help="loss when one layer alone is pruned, on text")
    group.add_argument("--by-kind", action="store_true", help="sensitivity of a kind's layers together: much faster")
    group.add_argument("--fraction", type=float, default=0.1, help="of a layer's rms that counts as 0 (default 0.1)")
    group.add_argument("--data", default="builtin", help="text: builtin, a txt/jsonl/parquet file, or a Hub data set")
    group.add_argument("--samples", type=int, default=8, help="windows (default 8)")
    group.add_argument("--length", type=int, default=128, help="tokens in a window (default 128)")
    group.add_argument("--plots", metavar="DIR", help="write a PNG of each into this folder")


def _methods(arguments: argparse.Namespace) -> Any:
    rows = []
    for address in addresses():
        method = find_method(address)
        needs = ", ".join(method.RULES.needs) or "-"
        rows.append({"method": address, "what": first_words(method), "needs": needs, "paper": method.RULES.paper})
    _print_table(arguments, ["method", "what", "needs", "paper"], [list(row.values()) for row in rows])
    return rows


def _inspect(arguments: argparse.Namespace) -> Any:
    wanted = [name for name in INSIGHTS if getattr(arguments, name)]
    if arguments.plots and not wanted:
        raise PlanError("--plots draws what --weights, --activations and --sensitivity find; give at least one of them")
    found = inspect_model(ModelSource(arguments.model))
    _say(
        arguments,
        f"{found['model']}: {found['architecture']}, {found['parameters'] / 1e6:.1f} M weights, "
        f"{found['bytes'] / 1e6:.1f} MB, {found['bits']:.2f} bits a weight",
    )
    if wanted:
        return found | _insights(arguments, wanted)
    _show_parts(arguments, found)
    return found


def _show_parts(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    kinds = [
        [k["kind"], str(k["count"]), f"{k['parameters'] / 1e6:.2f}", f"{k['bytes'] / 1e6:.1f}", f"{k['share']:.1%}"]
        for k in found["kinds"]
    ]
    _print_table(arguments, ["kind", "count", "M weights", "MB", "share"], kinds)
    for name, owner in found["tied"].items():
        _say(arguments, f"{name} shares the weight of {owner}")
    if found["kernels"]:
        rows = [[k["encoding"], str(k["layers"]), k["few"], k["many"]] for k in found["kernels"]]
        few = found["kernels"][0]["few_rows"]
        _print_table(arguments, ["stored as", "layers", f"up to {few} tokens", "more"], rows)
    for reason in dict.fromkeys(k["why_not"] for k in found["kernels"] if k["why_not"]):
        _say(arguments, f"no packed kernel: {reason}")
    if arguments.layers:
        rows = [[x["name"], x["kind"], f"{x['rows']} x {x['cols']}", x["encoding"]] for x in found["layers"]]
        _print_table(arguments, ["layer", "kind", "shape", "stored as"], rows)


def _insights(arguments: argparse.Namespace, wanted: list[str]) -> dict[str, Any]:
    folder = None if arguments.plots is None else plot_folder(arguments.plots)
    looks = look_into(
        ModelSource(arguments.model),
        wanted,
        _held_out(arguments),
        by_layer=arguments.layers,
        by_kind=arguments.by_kind,
        fraction=arguments.fraction,
        progress=Progress(show=False if arguments.json else None),
    )
    for insight in looks.values():
        if not arguments.json:
            short = None if arguments.layers or not isinstance(insight, SensitivityInsight) else MOST_SENSITIVE
            _print(insight.table() if short is None else insight.table(short))
    found: dict[str, Any] = {name: insight.to_dict() for name, insight in looks.items()}
    if folder is not None:
        found["plots"] = [str(insight.plot(folder / f"{name}.png")) for name, insight in looks.items()]
        _say(arguments, f"plots: {', '.join(found['plots'])}")
    return found


def _plan(arguments: argparse.Namespace) -> Any:
    plan = make_plan(_read_recipe(arguments))
    _say(
        arguments,
        f"{plan.source.name}: {plan.bytes_before / 1e6:.1f} MB -> {plan.bytes_after / 1e6:.1f} MB, "
        f"{8 * plan.bytes_before / plan.parameters:.2f} -> {8 * plan.bytes_after / plan.parameters:.2f} bits a weight "
        "(predicted)",
    )
    _print_table(arguments, ["stage", "layers", "stored as", "MB after", "memory"], _plan_rows(plan))
    for note in plan.notes:
        _say(arguments, _note(note))
    if arguments.layers:
        rows = [
            [n, f"{x.rows} x {x.cols}", x.encoding.describe() if x.encoding else "dense", f"{x.nbytes / 1e3:.1f}"]
            for n, x in plan.final_layers.items()
        ]
        _print_table(arguments, ["layer", "shape", "stored as", "kB"], rows)
    return plan.to_dict()


def _plan_rows(plan: Plan) -> list[list[str]]:
    rows = []
    for number, stage in enumerate(plan.stages, 1):
        encodings = {x.encoding.describe() for x in stage.layers.values() if x.encoding}
        size = plan.after(number)[1]
        shown = ", ".join(sorted(encodings)[:3]) + (" ..." if len(encodings) > 3 else "")
        memory = f"< {stage.memory / 2**30:.1f} GiB"
        rows.append([stage.stage.method, str(len(stage.layers)), shown or "-", f"{size / 1e6:.1f}", memory])
    return rows


def _run(arguments: argparse.Namespace) -> Any:
    progress = Progress(show=False if arguments.json else None)
    report = run_recipe(_read_recipe(arguments), arguments.out, overwrite=arguments.overwrite, progress=progress)
    if not arguments.json:
        show_report(report, arguments.out)
    return report.model_dump(mode="json")


def show_report(report: RunReport, out: str | Path) -> None:
    """Print what a run measured: the table, seconds a stage, peak memory, notes."""
    if not is_main():
        return
    _table(["measured", "original", "result"], [list(row) for row in summary(report)])
    _table(["stage", "time"], [list(row) for row in stage_seconds(report)])
    peak = max((stage.peak_memory for stage in report.stages), default=0)
    print(f"peak memory {peak / 2**30:.2f} GiB; saved in {out}")
    for stage in report.stages:
        for note in stage.notes:
            print(_note(f"{stage.method}: {note}"))


def _note(text: str) -> str:
    return textwrap.fill(f"note: {text}", 80, subsequent_indent="      ", break_on_hyphens=False)


def _eval(arguments: argparse.Namespace) -> Any:
    source = ModelSource(arguments.model)
    tokenizer, data = source.load_tokenizer(), _held_out(arguments)
    examples = None if data.label is None else load_examples(data, "held_out", tokenizer)
    windows = load_tokens(data, "held_out", tokenizer) if examples is None else tokens_from(examples.windows(tokenizer))
    original = None if arguments.original is None else ModelSource(arguments.original).load().to(device())
    model = source.load().to(device())
    found = measure(
        model, windows.ids, original=original, speed=arguments.speed, examples=examples, tokenizer=tokenizer
    )
    _print_table(arguments, ["measured", "value"], [[what, f"{value:.4g}"] for what, value in found.items()])
    used = examples or windows
    _say(arguments, f"on {used.description}")
    return found | {"data": used.description, "data_fingerprint": used.fingerprint}


def _held_out(arguments: argparse.Namespace) -> DataSource:
    try:
        columns = {key: value for key in ("column", "label") if (value := getattr(arguments, key, None))}
        return DataSource(source=arguments.data, samples=arguments.samples, length=arguments.length, **columns)
    except ValidationError as error:
        raise DataError(
            [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']}" for e in error.errors()]
        ) from None


def _card(arguments: argparse.Namespace) -> Any:
    text = model_card(read_report(arguments.folder))
    _say(arguments, text)
    return {"card": text}


def _read_recipe(arguments: argparse.Namespace) -> Recipe:
    overrides = list(arguments.overrides)
    recipe = load_recipe(arguments.recipe, overrides)
    return recipe if arguments.model is None else recipe.model_copy(update={"model": arguments.model})


def _print_table(arguments: argparse.Namespace, columns: list[str], rows: list[list[str]]) -> None:
    if not arguments.json and is_main():
        _table(columns, rows)


def _table(columns: list[str], rows: list[list[str]]) -> None:
    _print(make_table(columns, rows))


def _print(shown: RenderableType) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(shown)
    console.print()


def _say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.json and is_main():
        print(text)


if __name__ == "__main__":
    sys.exit(main())
