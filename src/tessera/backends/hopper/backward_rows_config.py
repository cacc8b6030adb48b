"""RowsConfig: everything that the small kernels around the backward's main one are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from tessera.backends.hopper.backward_config import Adding, BackwardConfig, PartLayout
from tessera.backends.hopper.config import Feature


@dataclass(frozen=True)
class RowsConfig:
    """What the small kernels of backward_rows.py are compiled for."""

    dim: int
    dim_v: int
    adding: Adding
    part_layout: PartLayout
    features: tuple[Feature, ...]
    subtracts_by_products: bool
    counts_tiles: bool
    keys: int
    """Of a tile, where packed sequences' tiles are counted."""

    @staticmethod
    def of(config: BackwardConfig) -> RowsConfig:
        """Of a configuration's features, those that say which rows there are, and the sinks. Who rounds is all one to them."""
        wanted = {Feature.VARLEN, Feature.SEQUSED_Q, Feature.QUERY_END, Feature.SINKS}
        features = tuple(x for x in config.features if x in wanted)
        adding = Adding.ANY_ORDER if config.adding is Adding.ANY_ORDER else Adding.ORDER
        return RowsConfig(
            config.dim, config.dim_v, adding, config.part_layout, features, config.subtracts_by_products, config.counts_tiles,
            config.keys if config.counts_tiles and Feature.VARLEN in features else 0,
        )  # fmt: skip
