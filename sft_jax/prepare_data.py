"""Prepares the data of a run ahead of it: python -m sft_jax.prepare_data --config configs/sft.py [--config.KEY=VALUE ...]

Rows are read, rendered and tokenised into data.cache_dir, where `train` and every other run with the same data, template
and tokenizer find them; then the data report is printed. Of the model only the tokenizer is needed, and config.json where
there is one. A command that was stopped or killed goes on where it was. Several hosts that share data.cache_dir do it
together, each with --process_index=I --process_count=N (I from 0 on); with a template that writes the date that takes
data.date. Exit codes: 0 done, 2 wrong input.
"""

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError

_CONFIG = cli.define_config_flag()
_INDEX = flags.DEFINE_integer("process_index", 0, "Which part this process prepares, from 0 on.")
_COUNT = flags.DEFINE_integer("process_count", 1, "Processes that prepare a part each, into one data.cache_dir.")


def main() -> None:
    config = cli.read_config(_CONFIG)
    if _COUNT.value < 1:
        raise UserError(f"--process_count: must be at least 1, not {_COUNT.value}.")
    if not 0 <= _INDEX.value < _COUNT.value:
        raise UserError(f"--process_index: must be from 0 to {_COUNT.value - 1}, one below --process_count, not {_INDEX.value}.")

    from sft_jax.data.prepare import day_of, prepare, prepare_part
    from sft_jax.data.report_lines import report_lines
    from sft_jax.data.stores.build import Part
    from sft_jax.training.resolved import data_model
    from sft_jax.versions import check_versions

    check_versions()
    config, tokenizer, vocab_size = data_model(config, print)
    day = day_of(config.data).isoformat()  # once, since the next day may begin meanwhile
    if _COUNT.value > 1:
        part = Part(_INDEX.value, _COUNT.value)
        if not prepare_part(config.data, model_path=tokenizer, vocab_size=vocab_size, part=part):
            return
    train = config.train
    data = prepare(
        config.data, model_path=tokenizer, vocab_size=vocab_size, seed=config.seed, epochs=train.epochs,
        rows=train.steps * train.batch_size, normalize=train.normalize, rendered_at=day,
    )  # fmt: skip
    for line in report_lines(data.report, train.batch_size, train.steps):
        print(line)
    for key, folder in data.stores.items():
        print(f"{key} is prepared in {folder}")


if __name__ == "__main__":
    cli.run(main, __doc__)
