"""Exports: the compressed model once more, in a format that other programs read.

An export stage comes after every stage that changes the model, and changes nothing itself. Besides what every method
has, its module offers

- `Config` with `to`, the folder it writes: below OUT/exports in a run, below the working directory in a script;
- `problems(layers, config, model) -> list[str]`: what the format cannot hold, from shapes and encodings alone; the
  model is there for its config and its modules' types: a plan has only a skeleton, on the meta device;
- `notes(layers, config, model) -> list[str]`: what the format holds in another way;
- `export(model, tokenizer, folder, config) -> list[str]`: writes into a folder that exists, returns notes;
- `apply`, which is `files.write_export` of that function.
"""

METHODS = ("compressed_tensors", "gguf")
