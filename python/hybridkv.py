"""hybridkv from Python: a thin face over the C ABI, by ctypes, without dependencies.

Tensors are torch tensors, numpy arrays or anything with the buffer protocol; their memory is used in
place, with the strides they have. Streams are raw handles: `torch.cuda.current_stream().cuda_stream`,
0 for the default stream. Arguments keep the tensors that they were made of; keep them until the stream
has passed the operation.

    device = hybridkv.Device("cuda:0")
    kernels = hybridkv.Kernels(device)
    kv = hybridkv.KV(pool[:, :, 0], pool[:, :, 1])      # [block, layer slot, head, token, dim] each
    kernels.append(hybridkv.append_args(kv, layer=0, k_new=k, v_new=v, ...), stream)
    args = hybridkv.attention_args(kv, layer=0, q=q, out=out, ...)
    plan = hybridkv.plan_args([args], memory=...)               # once per step: one layer of every class
    args.plan = kernels.plan(plan, stream)[0]
    args.workspace = hybridkv.span(torch.empty(kernels.attention_workspace(args), ...))
    kernels.attention(args, stream)

`Manager` says which blocks every sequence has in which tier and what has to be moved, `Mover` moves blocks between
layouts and memories by the paths that are fastest there:

    model = hybridkv.LinkModel(kernels)                         # measures them once
    mover = hybridkv.Mover(kernels, model, num_copies=1000)
    down = hybridkv.BlockMove(kernels, pool_layout, host_layout)
    down.copies(device_addresses, host_addresses, table)        # a pinned tensor of 64-bit integers [n, 3]
    mover.submit(table, n, hybridkv.DEVICE_TO_HOST, blocks=down, stream=stream)

Codecs, by name ("lx4", "int6", ...): `Kernels.encode` and `decode` between a pool and slots in device or pinned
memory; `encode_slot`, `decode_slot`, `inspect_slot` and `verify_slot` on the host, without a device.

Shapes, letters and meanings are those of include/hybridkv.h. Failures raise `Error`.
"""

import ctypes
import json
import os
import pathlib
from array import array
from ctypes import (
    POINTER, Structure, byref, c_char_p, c_float, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p,
    sizeof,
)

ABI_VERSION = 6
BF16, F16, F32, E4M3 = 0, 1, 2, 3
FULL, SLIDING, CHUNKED = 0, 1, 2
OFFLOAD, ONBOARD, PERSIST, FETCH = 0, 1, 2, 3
READY, DROPPED, VOID = 1, 2, 3
DEVICE, HOST, STORAGE = 0, 1, 2
STORED, REMOVED, CLEARED = 0, 1, 2
BLOCK_FIRST_HND, BLOCK_FIRST_NHD, HEADS_OUTERMOST = 0, 1, 2
HOST_TO_DEVICE, DEVICE_TO_HOST, INSIDE_DEVICE = 0, 1, 2
SLOT_OK, SLOT_ESCAPES, SLOT_NOT_FINITE, SLOT_CORRUPT = 0, 1, 2, 3

_DTYPES = {
    "torch.bfloat16": BF16, "torch.float16": F16, "torch.float32": F32,
    "torch.float8_e4m3fn": E4M3, "bfloat16": BF16, "float16": F16, "float32": F32,
}


class Error(RuntimeError):
    """A call that failed: the name of its status and what the library says."""

    def __init__(self, status, message):
        super().__init__(f"{status}: {message}")
        self.status = status


class Span(Structure):
    """A piece of memory; a null address stands for "not given"."""

    _fields_ = [("data", c_void_p), ("bytes", c_uint64)]


class HeadStrides(Structure):
    """Strides of a [token, head, dim] tensor, in elements."""

    _fields_ = [("token", c_int64), ("head", c_int64)]


class Window(Structure):
    """A row of the window table."""

    _fields_ = [
        ("kind", c_int32), ("extent", c_int32), ("sink_tokens", c_int32), ("group", c_int32),
        ("layer_slot", c_int32), ("reserved", c_int32 * 3),
    ]


class Copy(Structure):
    """A fragment of a batched move."""

    _fields_ = [("src", c_void_p), ("dst", c_void_p), ("bytes", c_uint64)]


class _KV(Structure):
    _fields_ = [
        ("k", Span), ("v", Span), ("stride_block", c_int64), ("stride_layer", c_int64),
        ("stride_head", c_int64), ("stride_token", c_int64), ("num_blocks", c_uint64),
        ("num_layer_slots", c_uint32), ("block_size", c_uint32), ("num_kv_heads", c_uint32),
        ("head_dim", c_uint32), ("dtype", c_uint32), ("reserved", c_uint32), ("k_scale", Span),
        ("v_scale", Span), ("scale_stride_block", c_int64), ("scale_stride_layer", c_int64),
        ("scale_stride_head", c_int64), ("scale_stride_token", c_int64),
    ]


class AppendArgs(Structure):
    _fields_ = [
        ("struct_bytes", c_uint64), ("kv", _KV), ("k_new", Span), ("v_new", Span),
        ("new_strides", HeadStrides), ("slot_mapping", Span), ("windows", Span), ("num_groups", c_uint32),
        ("num_layers", c_uint32), ("layer", c_uint32), ("num_tokens", c_uint32), ("dtype", c_uint32),
        ("reserved", c_uint32),
    ]


class ClassPlan(Structure):
    """How the decode work of a batch is dealt out in layers that see the same keys; all zero: not planned.
    `reads_early` may be set to 1 under the condition of include/hybridkv.h."""

    _fields_ = [
        ("memory", Span), ("num_seqs", c_uint32), ("num_kv_heads", c_uint32), ("num_parts", c_uint32),
        ("cut_parts", c_uint32), ("reads_early", c_uint32), ("reserved", c_uint32),
    ]


class AttentionArgs(Structure):
    _fields_ = [
        ("struct_bytes", c_uint64), ("kv", _KV), ("q", Span), ("q_strides", HeadStrides), ("out", Span),
        ("out_strides", HeadStrides), ("lse", Span), ("qo_indptr", Span), ("kv_len", Span),
        ("block_ids", Span), ("block_row", Span), ("first_block", Span), ("windows", Span),
        ("sink_logits", Span), ("tree_mask", Span), ("workspace", Span), ("plan", ClassPlan),
        ("num_groups", c_uint32), ("num_layers", c_uint32),
        ("layer", c_uint32), ("num_seqs", c_uint32), ("num_tokens", c_uint32), ("num_qo_heads", c_uint32),
        ("max_q_len", c_uint32), ("max_kv_len", c_uint32), ("sm_scale", c_float),
        ("logits_soft_cap", c_float), ("dtype", c_uint32), ("reserved", c_uint32),
    ]


class PlanArgs(Structure):
    _fields_ = [
        ("struct_bytes", c_uint64), ("classes", POINTER(AttentionArgs)), ("memory", Span),
        ("num_classes", c_uint32), ("batch_invariant", c_uint32),
    ]


class MergeArgs(Structure):
    _fields_ = [
        ("struct_bytes", c_uint64), ("states", Span), ("state_lse", Span), ("out", Span),
        ("out_strides", HeadStrides), ("lse", Span), ("sink_logits", Span), ("live_tokens", Span),
        ("in_dtype", c_uint32), ("out_dtype", c_uint32), ("num_states", c_uint32), ("num_tokens", c_uint32),
        ("num_qo_heads", c_uint32), ("head_dim", c_uint32),
    ]


class BlockLayout(Structure):
    """What a block holds and where its rows lie from its address on, strides in bytes: see `block_layout`."""

    _fields_ = [
        ("num_layers", c_uint32), ("num_parts", c_uint32), ("num_kv_heads", c_uint32), ("block_size", c_uint32),
        ("row_bytes", c_uint32), ("reserved", c_uint32), ("stride_layer", c_int64), ("stride_part", c_int64),
        ("stride_head", c_int64), ("stride_token", c_int64), ("layer_offsets", POINTER(c_int64)),
    ]


class _BlockMoveArgs(Structure):
    _fields_ = [
        ("struct_bytes", c_uint64), ("src", BlockLayout), ("dst", BlockLayout), ("first_layer", c_uint32),
        ("num_layers", c_uint32), ("first_token", c_uint32), ("num_tokens", c_uint32),
    ]


class MoveArgs(Structure):
    _fields_ = [
        ("struct_bytes", c_uint64), ("copies", Span), ("num_copies", c_uint64), ("blocks", c_void_p),
        ("max_ctas", c_uint32), ("reserved", c_uint32),
    ]


class _SubmitArgs(Structure):
    _fields_ = [
        ("struct_bytes", c_uint64), ("copies", Span), ("num_copies", c_uint64), ("blocks", c_void_p),
        ("way", c_uint32), ("both_ways", c_uint32),
    ]


class SlotBlock(Structure):
    """A block of the pool and the slot that it is encoded into or decoded from."""

    _fields_ = [("block", c_int64), ("slot", c_void_p)]


class SlotResult(Structure):
    """What became of a slot: SLOT_OK, or that it holds nothing (encode), or that its block is garbage (decode)."""

    _fields_ = [("hash", c_uint64), ("escapes", c_uint32), ("status", c_int32)]


class CodecArgs(Structure):
    _fields_ = [
        ("struct_bytes", c_uint64), ("kv", _KV), ("blocks", Span), ("results", Span), ("num_blocks", c_uint64),
        ("codec", c_uint32), ("first_layer_slot", c_uint32), ("num_layers", c_uint32), ("max_ctas", c_uint32),
    ]


class Geometry(Structure):
    """Shape of the block that a slot holds: [num_layers][K|V][num_kv_heads][block_size][head_dim]."""

    _fields_ = [
        ("num_layers", c_uint32), ("num_kv_heads", c_uint32), ("head_dim", c_uint32), ("block_size", c_uint32),
        ("dtype", c_uint32),
    ]


class SlotHeader(Structure):
    """What a slot says of itself."""

    _fields_ = [
        ("geometry", Geometry), ("codec_number", c_uint32), ("version", c_uint32), ("bytes", c_uint32),
        ("escapes", c_uint32), ("reserved", c_uint32), ("hash", c_uint64),
    ]

    @property
    def codec(self):
        """Name of the codec."""
        return library().hkv_codec_name(c_uint32(self.codec_number)).decode()


class Hit(Structure):
    """Tokens that a lookup found: over all tiers, on the device, on device and host."""

    _fields_ = [("tokens", c_uint64), ("device_tokens", c_uint64), ("host_tokens", c_uint64)]


class Allocation(Structure):
    """What an allocation gave; with `num_loads` of 0 the sequence is ready now."""

    _fields_ = [
        ("hit_tokens", c_uint64), ("device_hit_tokens", c_uint64), ("host_hit_tokens", c_uint64),
        ("num_tokens", c_uint64), ("num_loads", c_uint64),
    ]


class Transfer(Structure):
    """One block to move, to be answered once by `Manager.complete`."""

    _fields_ = [
        ("id", c_uint64), ("seq", c_uint64), ("has_seq", c_uint32), ("direction", c_uint32),
        ("group", c_uint32), ("source", c_uint32), ("target", c_uint32), ("reserved", c_uint32),
        ("hash", c_uint8 * 16),
    ]


class BlockCopy(Structure):
    """One block to copy inside the device pool, on the compute stream."""

    _fields_ = [("group", c_uint32), ("source", c_uint32), ("target", c_uint32)]


class Pin(Structure):
    """A handle, and the tokens and blocks that it keeps in their tier."""

    _fields_ = [("id", c_uint64), ("tokens", c_uint64), ("blocks", c_uint64)]


class Preemption(Structure):
    """What a preempted sequence keeps, and the transfers that it takes."""

    _fields_ = [("tokens", c_uint64), ("offloads", c_uint64)]


class Prefetch(Structure):
    """Tokens that hit once all has arrived, and the blocks that are fetched."""

    _fields_ = [("hit_tokens", c_uint64), ("blocks", c_uint64)]


class Completion(Structure):
    """What became of a sequence: READY, DROPPED or VOID."""

    _fields_ = [("kind", c_uint32), ("reserved", c_uint32), ("seq", c_uint64), ("valid_tokens", c_uint64)]


class Event(Structure):
    """A change of what a tier has: STORED, REMOVED or CLEARED."""

    _fields_ = [
        ("kind", c_uint32), ("tier", c_uint32), ("group", c_uint32), ("index", c_uint32),
        ("hash", c_uint8 * 16),
    ]


class _Slice(Structure):
    _fields_ = [("seq", c_uint64), ("start", c_uint32), ("tokens", c_uint32)]


class _StepArgs(Structure):
    _fields_ = [
        ("struct_bytes", c_uint64), ("seqs", POINTER(_Slice)), ("qo_indptr", c_void_p),
        ("kv_len", c_void_p), ("slot_mapping", c_void_p), ("block_row", c_void_p),
        ("first_block", c_void_p), ("block_ids", c_void_p), ("max_block_ids", c_uint64),
        ("num_seqs", c_uint32), ("num_groups", c_uint32), ("num_tokens", c_uint32),
        ("reserved", c_uint32),
    ]


class View:
    """Address, shape and strides (in elements) of a tensor."""

    def __init__(self, tensor):
        if hasattr(tensor, "data_ptr"):
            self.address, self.item = tensor.data_ptr(), tensor.element_size()
            self.shape, self.strides = tuple(tensor.shape), tuple(tensor.stride())
            self.dtype = _DTYPES.get(str(tensor.dtype))
            return
        if hasattr(tensor, "__array_interface__"):
            self.address, self.item = tensor.ctypes.data, tensor.itemsize
            self.dtype = _DTYPES.get(str(tensor.dtype))
            shape, strides = tensor.shape, tensor.strides
        else:
            memory = memoryview(tensor)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) if memory.nbytes else 0
            self.item, self.dtype = memory.itemsize, {"f": F32}.get(memory.format)
            shape, strides = memory.shape, memory.strides
        if any(stride % self.item for stride in strides):
            raise ValueError("strides are no multiples of the element size")
        self.shape, self.strides = tuple(shape), tuple(stride // self.item for stride in strides)

    def span(self):
        """From the first element to the end of the last one."""
        if 0 in self.shape:
            return Span(self.address, 0)
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        return Span(self.address, (last + 1) * self.item)

    def head_strides(self):
        """Of a [token, head, dim] tensor."""
        if len(self.shape) != 3 or (self.shape[2] > 1 and self.strides[2] != 1):
            raise ValueError(f"a [token, head, dim] tensor with contiguous dim is needed, not {self.shape}")
        return HeadStrides(self.strides[0], self.strides[1])


def span(tensor):
    """The memory of a tensor; `None` is "not given"."""
    return Span() if tensor is None else View(tensor).span()


class KV:
    """K and V of a pool of blocks: [block, layer slot, head, token, dim] each, or with `layout="NHD"`
    [block, layer slot, token, head, dim]. `dtype` where the tensors do not say. e4m3 elements need
    scales, float32 of the same shape without dim; dimensions of stride 0 (`expand`, `broadcast_to`)
    share them, and those of tokens are computed by `append`."""

    def __init__(self, k, v, layout="HND", dtype=None, k_scale=None, v_scale=None):
        views = View(k), View(v)
        if len({(view.shape, view.strides) for view in views}) != 1 or len(views[0].shape) != 5:
            raise ValueError("k and v are 5-dimensional, of one shape and with the same strides")
        shape, strides = views[0].shape, views[0].strides
        if strides[4] != 1:
            raise ValueError("the last dimension is contiguous")
        head, token = {"HND": (2, 3), "NHD": (3, 2)}[layout]
        self._kept = k, v, k_scale, v_scale
        self.view = _KV(
            k=views[0].span(), v=views[1].span(), stride_block=strides[0], stride_layer=strides[1],
            stride_head=strides[head], stride_token=strides[token], num_blocks=shape[0],
            num_layer_slots=shape[1], block_size=shape[token], num_kv_heads=shape[head],
            head_dim=shape[4], dtype=_dtype(views[0], dtype),
        )
        if k_scale is None and v_scale is None:
            return
        scales = View(k_scale), View(v_scale)
        if any(scale.shape != shape[:4] or scale.dtype != F32 for scale in scales):
            raise ValueError(f"scales are float32 of shape {shape[:4]}")
        if scales[0].strides != scales[1].strides:
            raise ValueError("k_scale and v_scale have the same strides")
        strides = scales[0].strides
        self.view.k_scale, self.view.v_scale = scales[0].span(), scales[1].span()
        self.view.scale_stride_block, self.view.scale_stride_layer = strides[:2]
        self.view.scale_stride_head, self.view.scale_stride_token = strides[head], strides[token]


def _dtype(view, given):
    dtype = view.dtype if given is None else given
    if dtype is None:
        raise ValueError("the type of the elements is not known: give dtype")
    return dtype


def _keeping(args, *tensors):
    args.kept = tensors
    return args


def _sixteen_bits(kv):
    """The type that queries and new tokens of a pool have, unless it is e4m3."""
    return None if kv.view.dtype == E4M3 else kv.view.dtype


def append_args(kv, *, layer, k_new, v_new, slot_mapping, windows, dtype=None):
    """k_new, v_new [T, Hk, D], of `dtype` where the tensors do not say; slot_mapping [G, T] int64; windows [L] rows of 32 bytes."""
    k, v, slots = View(k_new), View(v_new), View(slot_mapping)
    if k.shape != v.shape or k.strides != v.strides:
        raise ValueError("k_new and v_new are of one shape and have the same strides")
    if slots.shape[-1] != k.shape[0] or slots.item != 8:
        raise ValueError("slot_mapping is [groups, tokens] of int64")
    table = span(windows)
    args = AppendArgs(
        struct_bytes=sizeof(AppendArgs), kv=kv.view, k_new=k.span(), v_new=v.span(),
        new_strides=k.head_strides(), slot_mapping=slots.span(), windows=table,
        num_groups=slots.shape[0], num_layers=table.bytes // sizeof(Window), layer=layer,
        num_tokens=k.shape[0], dtype=_dtype(k, _sixteen_bits(kv) if dtype is None else dtype),
    )
    return _keeping(args, kv, k_new, v_new, slot_mapping, windows)


def attention_args(
    kv, *, layer, q, out, qo_indptr, kv_len, block_ids, block_row, windows, max_q_len, max_kv_len,
    first_block=None, lse=None, sink_logits=None, workspace=None, sm_scale=None, logits_soft_cap=0.0,
    tree_mask=None, dtype=None,
):
    """q, out [T, Hq, D]; qo_indptr [S + 1], kv_len [S], block_ids int32; block_row [G, S] int64;
    first_block [G, S] int32; lse [T, Hq], sink_logits [Hq] float32; windows [L] rows of 32 bytes;
    tree_mask [T] of 32 bits. `dtype` where q does not say."""
    query, output, rows = View(q), View(out), View(block_row)
    if query.shape != output.shape:
        raise ValueError("q and out are of one shape")
    table = span(windows)
    args = AttentionArgs(
        struct_bytes=sizeof(AttentionArgs), kv=kv.view, q=query.span(), q_strides=query.head_strides(),
        out=output.span(), out_strides=output.head_strides(), lse=span(lse), qo_indptr=span(qo_indptr),
        kv_len=span(kv_len), block_ids=span(block_ids), block_row=rows.span(),
        first_block=span(first_block), windows=table, sink_logits=span(sink_logits),
        workspace=span(workspace), num_groups=rows.shape[0], num_layers=table.bytes // sizeof(Window),
        layer=layer, num_seqs=View(kv_len).shape[0], num_tokens=query.shape[0],
        num_qo_heads=query.shape[1], max_q_len=max_q_len, max_kv_len=max_kv_len,
        sm_scale=query.shape[2] ** -0.5 if sm_scale is None else sm_scale,
        logits_soft_cap=logits_soft_cap, tree_mask=span(tree_mask),
        dtype=_dtype(query, _sixteen_bits(kv) if dtype is None else dtype),
    )
    return _keeping(
        args, kv, q, out, lse, qo_indptr, kv_len, block_ids, block_row, first_block, windows, sink_logits,
        tree_mask, workspace,
    )


def plan_args(classes, *, memory=None, batch_invariant=False):
    """classes: the `attention_args` of one layer of each window class of a batch; memory on the device, of
    `Kernels.plan_memory` bytes."""
    args = PlanArgs(
        struct_bytes=sizeof(PlanArgs), classes=(AttentionArgs * len(classes))(*classes),
        memory=span(memory), num_classes=len(classes), batch_invariant=batch_invariant,
    )
    return _keeping(args, classes, memory)


def merge_args(
    *, states, state_lse, out, lse=None, sink_logits=None, live_tokens=None, in_dtype=None, out_dtype=None
):
    """states [N, T, Hq, D]; out [T, Hq, D]; state_lse [N, T, Hq], lse [T, Hq], sink_logits [Hq] float32;
    live_tokens one int32."""
    partial, output = View(states), View(out)
    if partial.shape[1:] != output.shape:
        raise ValueError("states is [states, *out.shape]")
    args = MergeArgs(
        struct_bytes=sizeof(MergeArgs), states=partial.span(), state_lse=span(state_lse),
        out=output.span(), out_strides=output.head_strides(), lse=span(lse),
        sink_logits=span(sink_logits), live_tokens=span(live_tokens),
        in_dtype=_dtype(partial, in_dtype),
        out_dtype=_dtype(output, out_dtype), num_states=partial.shape[0], num_tokens=output.shape[0],
        num_qo_heads=output.shape[1], head_dim=output.shape[2],
    )
    return _keeping(args, states, state_lse, out, lse, sink_logits, live_tokens)


def move_args(copies, num_copies, max_ctas=0, blocks=None):
    """copies: `num_copies` rows (src, dst, bytes) of 64-bit integers, on the device or pinned; each a fragment, or a
    block of the `BlockMove`."""
    args = MoveArgs(
        struct_bytes=sizeof(MoveArgs), copies=span(copies), num_copies=num_copies, blocks=blocks and blocks._handle,
        max_ctas=max_ctas,
    )
    return _keeping(args, copies, blocks)


def block_layout(
    order=BLOCK_FIRST_HND, *, num_layers, num_kv_heads, block_size, row_bytes, num_parts=2, stride_layer=None,
    stride_part=None, layer_offsets=None,
):
    """Rows [layer][K|V][head][token] of `row_bytes` each, contiguous in this order, but for the strides, in bytes, of pools
    that have all blocks of a layer, or of K, together; or byte offsets of the layers from the first one."""
    layout = BlockLayout(
        num_layers=num_layers, num_parts=num_parts, num_kv_heads=num_kv_heads, block_size=block_size,
        row_bytes=row_bytes,
    )
    _call("hkv_block_layout_fill", c_uint32(order), byref(layout))
    if stride_layer is not None:
        layout.stride_layer = stride_layer
    if stride_part is not None:
        layout.stride_part = stride_part
    if layer_offsets is not None:
        if len(layer_offsets) != num_layers:
            raise ValueError(f"{len(layer_offsets)} offsets of {num_layers} layers")
        layout.layer_offsets = (c_int64 * num_layers)(*layer_offsets)
    return layout


def codec_args(
    kv, *, codec, blocks, results, num_blocks, first_layer_slot=0, num_layers=None, max_ctas=0
):
    """codec: a name; blocks: `num_blocks` rows (block, address of its slot) of 64-bit integers, results: as many
    `SlotResult` of 16 bytes, both on the device or pinned. All layer slots from the first one on, unless
    `num_layers` says."""
    if num_layers is None:
        num_layers = max(kv.view.num_layer_slots - first_layer_slot, 0)
    args = CodecArgs(
        struct_bytes=sizeof(CodecArgs), kv=kv.view, blocks=span(blocks), results=span(results),
        num_blocks=num_blocks, codec=_codec(codec), first_layer_slot=first_layer_slot,
        num_layers=num_layers, max_ctas=max_ctas,
    )
    return _keeping(args, kv, blocks, results)


def _codec(name):
    number = c_uint32()
    _call("hkv_codec_by_name", name.encode(), byref(number))
    return number.value


def slot_bytes(codec, geometry):
    """Bytes of a slot of a codec, by its name: the same for every block of the geometry (`lxe`: at most)."""
    size = c_uint64()
    _call("hkv_slot_bytes", c_uint32(_codec(codec)), byref(geometry), byref(size))
    return size.value


def encode_slot(codec, geometry, block, slot):
    """Encodes a block, contiguous 16-bit elements on the host, into a slot of `slot_bytes`. Gives a `SlotResult`: the
    slot holds the block only if its status is SLOT_OK."""
    result = SlotResult()
    _call(
        "hkv_slot_encode", c_uint32(_codec(codec)), byref(geometry), *_source(block, item=2), *_whole(slot),
        byref(result),
    )
    return result


def decode_slot(geometry, slot, block):
    """Decodes a slot of any codec into a block, once all of it has been verified. Gives its `SlotHeader`."""
    header = SlotHeader()
    _call("hkv_slot_decode", byref(geometry), *_source(slot), *_whole(block, item=2), byref(header))
    return header


def inspect_slot(slot):
    """The `SlotHeader` at the beginning of a slot; the rest is not looked at."""
    header = SlotHeader()
    _call("hkv_slot_inspect", *_source(slot), byref(header))
    return header


def verify_slot(geometry, slot):
    """Verifies a slot, header and content hash; gives its `SlotHeader`."""
    header = SlotHeader()
    _call("hkv_slot_verify", byref(geometry), *_source(slot), byref(header))
    return header


def _source(tensor, item=1):
    """As `_whole`, of what is only read: `bytes`, too."""
    if isinstance(tensor, bytes):
        return ctypes.cast(c_char_p(tensor), c_void_p), c_uint64(len(tensor) // item)
    return _whole(tensor, item)


def _whole(tensor, item=1):
    """Address and number of items of a tensor without gaps, on the host."""
    view, dense = View(tensor), 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides)):
        if size > 1 and stride != dense:
            raise ValueError(f"contiguous memory is needed, not strides {view.strides} of {view.shape}")
        dense *= size
    return c_void_p(view.address), c_uint64(dense * view.item // item)


class Device:
    """`cpu` or `cuda:N`."""

    def __init__(self, name="cpu"):
        self._library, self._handle = library(), c_void_p()
        kind, _, ordinal = name.partition(":")
        if kind == "cpu":
            _call("hkv_device_cpu", byref(self._handle))
        elif kind == "cuda":
            _call("hkv_device_cuda", c_uint32(int(ordinal or 0)), byref(self._handle))
        else:
            raise ValueError(f"a device is cpu or cuda:N, not {name}")

    @property
    def name(self):
        """What the driver calls the device."""
        return self._library.hkv_device_name(self._handle).decode()

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.hkv_device_destroy(self._handle)


class Kernels:
    """The kernels of a device, loaded; `checked` validates what is in device tables before each launch."""

    def __init__(self, device, checked=False):
        self._library, self._handle = library(), c_void_p()
        load = "hkv_kernels_load_checked" if checked else "hkv_kernels_load"
        _call(load, device._handle, byref(self._handle))

    def append(self, args, stream=0):
        """Writes the K and V of new tokens into their slots."""
        _call("hkv_append", self._handle, byref(args), c_void_p(stream))

    def attention_workspace(self, args):
        """Bytes of device memory that `attention` needs as its workspace for these arguments."""
        size = c_uint64()
        _call("hkv_attention_workspace", self._handle, byref(args), byref(size))
        return size.value

    def plan_memory(self, args):
        """Bytes of device memory that `plan` needs for these arguments."""
        size = c_uint64()
        _call("hkv_plan_memory", self._handle, byref(args), byref(size))
        return size.value

    def plan(self, args, stream=0):
        """Deals the decode work of a batch to CTAs, once per step; returns the plan of each class, for
        `args.plan` of the layers that come after it in the stream."""
        _call("hkv_plan", self._handle, byref(args), c_void_p(stream))
        plans = [ClassPlan() for _ in range(args.num_classes)]
        for index, plan in enumerate(plans):
            _call("hkv_planned", self._handle, byref(args), c_uint32(index), byref(plan))
        return plans

    def attention(self, args, stream=0):
        """Attends the queries to the live blocks of their sequences."""
        _call("hkv_attention", self._handle, byref(args), c_void_p(stream))

    def merge_states(self, args, stream=0):
        """Merges attention states of the same rows."""
        _call("hkv_merge_states", self._handle, byref(args), c_void_p(stream))

    def move_blocks(self, args, stream=0):
        """Copies every fragment of a table."""
        _call("hkv_move_blocks", self._handle, byref(args), c_void_p(stream))

    def encode(self, args, stream=0):
        """Encodes blocks of the pool into slots; the results say which slots hold their block."""
        _call("hkv_encode", self._handle, byref(args), c_void_p(stream))

    def decode(self, args, stream=0):
        """Decodes slots into blocks; the results say which blocks are garbage and must not be attended."""
        _call("hkv_decode", self._handle, byref(args), c_void_p(stream))

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.hkv_kernels_destroy(self._handle)


class BlockMove:
    """The move of blocks from one layout to another: all of each, or these `layers` and `tokens` (ranges). To be kept
    until the streams have passed the moves that name it."""

    def __init__(self, kernels, src, dst, layers=None, tokens=None):
        self._library, self._handle = library(), c_void_p()
        layers = range(src.num_layers) if layers is None else layers
        tokens = range(src.block_size) if tokens is None else tokens
        if layers.step != 1 or tokens.step != 1:
            raise ValueError("layers and tokens are ranges of step 1")
        args = _BlockMoveArgs(
            struct_bytes=sizeof(_BlockMoveArgs), src=src, dst=dst, first_layer=layers.start,
            num_layers=len(layers), first_token=tokens.start, num_tokens=len(tokens),
        )
        _call("hkv_block_move_create", kernels._handle, byref(args), byref(self._handle))

    def copies(self, src, dst, table):
        """Writes the descriptors of blocks at these addresses into a table, [n, 3] 64-bit integers on the host."""
        if len(src) != len(dst):
            raise ValueError(f"{len(src)} sources and {len(dst)} targets")
        memory = span(table)
        if memory.bytes < len(src) * sizeof(Copy):
            raise ValueError(f"a table of {memory.bytes} bytes for {len(src)} blocks")
        addresses = [(c_uint64 * len(side))(*side) for side in (src, dst)]
        _call("hkv_block_move_copies", self._handle, *addresses, c_uint64(len(src)), c_void_p(memory.data))

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.hkv_block_move_destroy(self._handle)


class LinkModel:
    """What the paths between the host and a device cost, measured in less than 200 ms."""

    def __init__(self, kernels):
        self._library, self._handle = library(), c_void_p()
        _call("hkv_link_model_calibrate", kernels._handle, byref(self._handle))

    def quota(self, way, rows, size, both_ways=False):
        """How many CTAs `Kernels.move_blocks` should be given for so many rows and bytes."""
        ctas = c_uint32()
        _call(
            "hkv_link_model_quota", self._handle, c_uint32(way), c_uint32(both_ways), c_uint64(rows),
            c_uint64(size), byref(ctas),
        )
        return ctas.value

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.hkv_link_model_destroy(self._handle)


class Mover:
    """Plans moves from a model and submits them. With `staging` blocks may go by way of 24 MiB of device memory."""

    def __init__(self, kernels, model, num_copies, staging=True):
        self._library, self._handle = library(), c_void_p()
        _call(
            "hkv_mover_create", kernels._handle, model._handle, c_uint64(num_copies), c_uint32(staging),
            byref(self._handle),
        )

    def submit(self, copies, num_copies, way, blocks=None, both_ways=False, stream=0):
        """copies: rows (src, dst, bytes) in pinned memory, the mover's own until the stream has passed the move; each a
        fragment, or a block of the `BlockMove`. `both_ways`: the link is busy the other way meanwhile."""
        args = _SubmitArgs(
            struct_bytes=sizeof(_SubmitArgs), copies=span(copies), num_copies=num_copies,
            blocks=blocks and blocks._handle, way=way, both_ways=both_ways,
        )
        _call("hkv_mover_submit", self._handle, byref(args), c_void_p(stream))

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.hkv_mover_destroy(self._handle)


class Manager:
    """Which blocks every sequence has in which tier, and what has to be moved. `config` is a dictionary of the
    fields that include/hybridkv.h shows. Used by one thread at a time."""

    def __init__(self, config):
        self._library, self._handle = library(), c_void_p()
        _call("hkv_manager_create", json.dumps(config).encode(), byref(self._handle))

    def lookup(self, tokens, salt="", lora=""):
        """The longest prefix that could be served now; nothing is pinned."""
        hit = Hit()
        _call("hkv_manager_lookup", self._handle, *_tokens(tokens), salt.encode(), lora.encode(), byref(hit))
        return hit

    def allocate(self, seq, tokens, budget=0, salt="", lora=""):
        """Begins a sequence, with blocks for its hit and the next `budget` tokens of its prompt (0: for all)."""
        given = Allocation()
        _call(
            "hkv_manager_allocate", self._handle, c_uint64(seq), *_tokens(tokens), c_uint64(budget),
            salt.encode(), lora.encode(), byref(given),
        )
        return given

    def append(self, seq, tokens):
        """Adds tokens to a sequence."""
        _call("hkv_manager_append", self._handle, c_uint64(seq), *_tokens(tokens))

    def step(self, slices, num_groups):
        """The arrays of a step of (sequence, position of the first new token, new tokens) each, by their names in
        the arguments of the operations."""
        seqs = (_Slice * len(slices))(*(_Slice(*one) for one in slices))
        tokens, count = sum(one[2] for one in slices), c_uint64()
        args = _StepArgs(
            struct_bytes=sizeof(_StepArgs), seqs=seqs, num_seqs=len(slices), num_groups=num_groups,
            num_tokens=tokens,
        )
        _call("hkv_manager_step", self._handle, byref(args), byref(count))
        rows = num_groups * len(slices)
        arrays = {
            "qo_indptr": array("i", bytes(4 * (len(slices) + 1))), "kv_len": array("i", bytes(4 * len(slices))),
            "slot_mapping": array("q", bytes(8 * num_groups * tokens)), "block_row": array("q", bytes(8 * rows)),
            "first_block": array("i", bytes(4 * rows)), "block_ids": array("I", bytes(4 * max(count.value, 1))),
        }
        for name, values in arrays.items():
            setattr(args, name, values.buffer_info()[0])
        args.max_block_ids = count.value
        _call("hkv_manager_step", self._handle, byref(args), byref(count))
        return arrays

    def advance(self, seq, computed, settled):
        """Says how far the work on a sequence has been submitted, and how far it has ended."""
        _call("hkv_manager_advance", self._handle, c_uint64(seq), c_uint64(computed), c_uint64(settled))

    def overlap(self, seq):
        """Lets the steps of a sequence run behind its loads."""
        _call("hkv_manager_overlap", self._handle, c_uint64(seq))

    def free(self, seq):
        """Ends a sequence."""
        _call("hkv_manager_free", self._handle, c_uint64(seq))

    def abort(self, seq, room=1024):
        """Ends a sequence whose step failed; gives up to `room` others that are to be aborted, too."""
        return self._naming(room, "hkv_manager_abort", c_uint64(seq))

    def reserve(self, seq, tokens):
        """Makes room in the manager's own memory for a sequence to grow to so many tokens."""
        _call("hkv_manager_reserve", self._handle, c_uint64(seq), c_uint64(tokens))

    def fork(self, parent, child):
        """Begins a sequence with the computed tokens of another one; gives their number."""
        tokens = c_uint64()
        _call("hkv_manager_fork", self._handle, c_uint64(parent), c_uint64(child), byref(tokens))
        return tokens.value

    def trim(self, seq, tokens, room=1024):
        """Cuts a sequence back; what was computed stays findable. Gives those that are to be aborted, as `abort`."""
        return self._naming(room, "hkv_manager_trim", c_uint64(seq), c_uint64(tokens))

    def rollback(self, seq, tokens, room=1024):
        """Cuts a sequence back as if the tokens (rejected drafts) had never been given; otherwise as `trim`."""
        return self._naming(room, "hkv_manager_rollback", c_uint64(seq), c_uint64(tokens))

    def preempt(self, seq, room=1024):
        """Swaps a sequence out to the host. Gives what it keeps, and those that are to be aborted."""
        kept = Preemption()
        return kept, self._naming(room, "hkv_manager_preempt", c_uint64(seq), byref(kept))

    def resume(self, seq):
        """Swaps a sequence in again."""
        given = Allocation()
        _call("hkv_manager_resume", self._handle, c_uint64(seq), byref(given))
        return given

    def prefetch(self, seq, tokens, now, salt="", lora=""):
        """Begins to fetch what storage holds of a prompt, for a sequence to come."""
        begun = Prefetch()
        _call(
            "hkv_manager_prefetch", self._handle, c_uint64(seq), *_tokens(tokens), salt.encode(), lora.encode(),
            c_uint64(now), byref(begun),
        )
        return begun

    def poll_prefetch(self, now):
        """The sequences whose prefetch has arrived or has had its time, each once."""
        return self._drain("hkv_manager_poll_prefetch", c_uint64, before=[c_uint64(now)])

    def cancel_prefetch(self, seq):
        """Ends a prefetch whose request has gone."""
        _call("hkv_manager_cancel_prefetch", self._handle, c_uint64(seq))

    def copies(self):
        """The copies to start, which go before all transfers."""
        return self._drain("hkv_manager_copies", BlockCopy)

    def transfers(self):
        """The transfers to start."""
        return self._drain("hkv_manager_transfers", Transfer)

    def complete(self, transfer, succeeded=True):
        """Says how a transfer (or its id) ended; gives what that means for sequences."""
        told, said = [], Completion()
        _call(
            "hkv_manager_complete", self._handle, c_uint64(getattr(transfer, "id", transfer)),
            c_uint32(bool(succeeded)), byref(said),
        )
        while said.kind:
            told.append(said)
            said = Completion()
            _call("hkv_manager_next_completion", self._handle, byref(said))
        return told

    def pin(self, tier, tokens, salt="", lora=""):
        """Keeps what a tier has of a prompt there until `unpin`."""
        pin = Pin()
        _call(
            "hkv_manager_pin", self._handle, c_uint32(tier), *_tokens(tokens), salt.encode(), lora.encode(),
            byref(pin),
        )
        return pin

    def unpin(self, pin):
        """Gives a pin (or its id) back."""
        _call("hkv_manager_unpin", self._handle, c_uint64(getattr(pin, "id", pin)))

    def set_quota(self, tier, salt, size, block_bytes):
        """Limits what the blocks of a salt may take of HOST or STORAGE, in bytes; `None`: no longer."""
        size = 2**64 - 1 if size is None else size
        _call(
            "hkv_manager_set_quota", self._handle, c_uint32(tier), salt.encode(), c_uint64(size),
            c_uint64(block_bytes),
        )

    def tick(self, now):
        """Says what time it is, in nanoseconds."""
        _call("hkv_manager_tick", self._handle, c_uint64(now))

    def record_events(self, on=True):
        """Starts or stops the recording of events."""
        _call("hkv_manager_record_events", self._handle, c_uint32(bool(on)))

    def events(self):
        """Events since the last call, oldest first."""
        return self._drain("hkv_manager_events", Event)

    def stats(self):
        """Counters, how full the tiers are, and the manager's own memory: a dictionary."""
        return json.loads(self._text("hkv_manager_stats"))

    def prometheus(self):
        """The counters as Prometheus text."""
        return self._text("hkv_manager_prometheus")

    def _text(self, name):
        size = c_uint64()
        _call(name, self._handle, None, c_uint64(0), byref(size))
        text = ctypes.create_string_buffer(size.value)
        _call(name, self._handle, text, size, byref(size))
        return text.value.decode()

    def _naming(self, room, name, *arguments):
        others, count = (c_uint64 * room)(), c_uint64()
        _call(name, self._handle, *arguments, others, c_uint64(room), byref(count))
        return others[:min(count.value, room)]

    def _drain(self, name, kind, before=(), at_once=256):
        items, room, count = [], kind * at_once, c_uint64(1)
        while count.value:
            some = room()
            _call(name, self._handle, *before, some, c_uint64(at_once), byref(count))
            items += some[:count.value]
        return items

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.hkv_manager_destroy(self._handle)


def _tokens(tokens):
    return (c_uint32 * len(tokens))(*tokens), c_uint64(len(tokens))


_loaded = None


def library():
    """The shared library: `HYBRIDKV_LIB`, or the one built in, or bundled with, this project."""
    global _loaded
    if _loaded is None:
        root = pathlib.Path(__file__).resolve().parent.parent
        folders = ["lib", "target/release", "target/debug", "target/debug/deps"]
        places = [root / folder / "libhybridkv.so" for folder in folders]
        path = os.environ.get("HYBRIDKV_LIB") or next((p for p in places if p.is_file()), None)
        if path is None:
            raise OSError("libhybridkv.so was not found: build it with cargo, or set HYBRIDKV_LIB")
        loaded = ctypes.CDLL(str(path))
        for name in ["hkv_last_error", "hkv_version", "hkv_status_name", "hkv_device_name", "hkv_codec_name"]:
            getattr(loaded, name).restype = c_char_p
        handles = ["device", "kernels", "manager", "block_move", "link_model", "mover"]
        for name in [*(f"hkv_{handle}_destroy" for handle in handles), "hkv_device_name"]:
            getattr(loaded, name).argtypes = [c_void_p]
        if loaded.hkv_abi_version() != ABI_VERSION:
            raise OSError(f"{path} has ABI version {loaded.hkv_abi_version()}, not {ABI_VERSION}")
        _loaded = loaded
    return _loaded


def _call(name, *arguments):
    loaded = library()
    status = getattr(loaded, name)(*arguments)
    if status != 0:
        raise Error(loaded.hkv_status_name(status).decode(), loaded.hkv_last_error().decode())
