"""Object stores: the one room that knows that a path may be ``s3://…`` or ``gs://…``. See docs/stores.md."""

from panacea_jax.stores.addresses import by_address, is_address
from panacea_jax.stores.copies import (
    direct,
    publish,
    published,
    refresh,
    session,
    stand_in,
    working_copy,
)

__all__ = ["by_address", "direct", "is_address", "publish", "published", "refresh", "session", "stand_in", "working_copy"]
