"""The numbers of the codec: type ids on the wire, and its limits. Nothing else stands here.

A type id is written once and never given to another type: an old body must not be read as something new.
"""

from __future__ import annotations

__all__ = [
    "BIG_INT",
    "BYTEARRAY",
    "BYTES",
    "COMPLEX",
    "DATE",
    "DATETIME",
    "DICT",
    "FIRST_PUBLIC_ID",
    "FLMODEL",
    "FOLDED",
    "FOLD_LENGTH",
    "FROZENSET",
    "INLINE_BELOW",
    "INLINE_ROOM",
    "KERAS_VARIABLE",
    "LAST_PUBLIC_ID",
    "LIST",
    "MAX_BODY",
    "MAX_CONTAINERS",
    "MAX_DEPTH",
    "NDARRAY",
    "NDARRAY_VIEW",
    "NUMPY_SCALAR",
    "ORDERED_DICT",
    "PARAMS_TYPE",
    "SET",
    "STR",
    "TENSOR",
    "TF_RAGGED",
    "TF_SPARSE",
    "TF_TENSOR",
    "TF_VARIABLE",
    "TIME",
    "TIMEDELTA",
    "TUPLE",
]

# Type ids 0 to 99 belong to flarebus.
FOLDED = 0  # not a type: a container too long for one msgpack array, cut into parts
LIST = 1
DICT = 2
TUPLE = 3
SET = 4
FROZENSET = 5
ORDERED_DICT = 6
BIG_INT = 7
BYTES = 8  # in a buffer; short ones are msgpack's own
STR = 9  # likewise
BYTEARRAY = 10
COMPLEX = 11
DATETIME = 12
DATE = 13
TIME = 14
TIMEDELTA = 15
FLMODEL = 20
PARAMS_TYPE = 21
NDARRAY = 30
NDARRAY_VIEW = 31
NUMPY_SCALAR = 32
TENSOR = 40
TF_TENSOR = 50
TF_VARIABLE = 51
TF_RAGGED = 52
TF_SPARSE = 53
KERAS_VARIABLE = 54

FIRST_PUBLIC_ID = 100
LAST_PUBLIC_ID = 32_767

# Bytes of one body. Tensors and long strings are not in it, so this is room for some 20,000 parameter names.
MAX_BODY = 1 << 20
# Levels of a value. Far below Python's recursion limit, and with the wrapping below the 511 levels msgpack packs.
MAX_DEPTH = 100
# A hostile megabyte of empty lists would become 64 MB of Python objects.
MAX_CONTAINERS = 32_768
# msgpack allocates a list at its declared length before it reads the items, and nests 1024 lists: 512 items
# a list keep what a hostile body can reserve at 4 MiB. Longer containers are cut into parts.
FOLD_LENGTH = 512
# Arrays below this many bytes stay in the body: a frame of its own costs more than copying so little.
INLINE_BELOW = 512
INLINE_ROOM = 128 << 10
