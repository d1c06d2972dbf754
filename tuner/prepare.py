"""`tuner prepare`: from a config's text to tokenised and packed data in the cache; no model is needed."""

from tuner.check import DATA_PARTS, check
from tuner.config import loads
from tuner.dataset.staged import StagedDataset
from tuner.engine.assemble import Assembly
from tuner.engine.stages import told_shares


def prepare(source: str, *, name: str = "config.py") -> None:
    """Make what training opens, and print the ledger of its tokens and its packs.

    Of a stream it makes the first windows; training makes the others as it goes.

    Args:
        source: the text of a config with all settings filled in; its model is never looked at.
        name: what error messages call the config.

    Raises:
        UserError: whatever the user can mend.
    """
    config = loads(source, name)
    check(config, DATA_PARTS)
    dataloader = Assembly(config).build(config.train_dataloader)
    if isinstance(dataloader.dataset, StagedDataset):
        print(told_shares(dataloader.dataset))
    print(f"{len(dataloader.sampler):,} optimizer steps on one rank. The data is ready for `tuner train {name}`.")
