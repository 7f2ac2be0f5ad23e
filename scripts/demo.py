"""The main job on a real model: SmolLM2-135M in, a third of its bytes out, measured, loaded again, talking.

    python scripts/demo.py            # what `make demo` runs

Everything goes below the cache folder ($HF_SLIM_CACHE, or ~/.cache/hf_slim). An interrupted demo goes on where it was;
a finished one is shown again at once, unless the code or the recipe has changed since.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from demo_model import FetchError, default_cache, fetch
from transformers.utils import logging

from hf_slim.cli import show_report
from hf_slim.core.errors import ResumeError
from hf_slim.recipe import load_recipe
from hf_slim.run import run_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "demo.yaml"

TALK = """
import sys
import hf_slim
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
hf_slim.cache_decoded(model)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
question = [{"role": "user", "content": "Write one sentence about the sea."}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=48, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True).strip())
"""


def compress(model: Path, out: Path) -> None:
    """Run the recipe; start anew when what is there was made from other inputs."""
    recipe = load_recipe(RECIPE).model_copy(update={"model": str(model)})
    try:
        report = run_recipe(recipe, out)
    except ResumeError:
        report = run_recipe(recipe, out, overwrite=True)
    show_report(report, out)


def talk(folder: Path) -> str:
    """What the compressed model says, loaded by a fresh process."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", TALK, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip()


def main() -> None:
    """Fetch, compress, talk."""
    start = time.perf_counter()
    logging.disable_progress_bar()  # ours says more
    try:
        model = fetch(default_cache())
    except FetchError as error:
        sys.exit(f"error: {error}")
    out = default_cache() / "demo"
    print(f"compressing {model.name} with {RECIPE.relative_to(ROOT)}", flush=True)
    compress(model, out)
    print("loaded by a fresh process and asked for one sentence about the sea, the compressed model says:", flush=True)
    print(f"  {talk(out)}")
    print(f"\nall of it took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
