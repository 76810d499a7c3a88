"""The laws of caches: what a memory must keep, whatever it stores.

Most laws drive one site's memory directly, with drawn queries, keys and values, rotated where a model would rotate them, in
a batch of a full and a left-padded row whose padding holds large junk. The rest run `generate` on a tiny random Llama. A
method is taken at its trial settings with `CacheSpec.small` on top, so that it acts on tens of tokens.
"""

from qkv.testing.caches._memory import Stream, drive, places, site, small, stream
from qkv.testing.caches.generation import spied, tiny

__all__ = ["Stream", "drive", "places", "site", "small", "spied", "stream", "tiny"]
