"""Write a GGUF file whose model follows a script, for a llama.cpp server under test.

    python model.py OUT.gguf < script.json

The script is a JSON object: `{"template": "<Jinja>", "chains": {"<|hello|>": ["Hel", "lo."]}, "loops": {…}, "openings":
{…}}`. A chat template that ends with the token `<|hello|>` makes the model write the pieces `Hel`, `lo.` and end. The
pieces of a loop are repeated without end; after those of an opening each token is as likely as another, so that a
grammar decides. The model is a Markov chain: attention and feed-forward weights are 0, each token has an
embedding of its own, and the output matrix holds the token that follows. Sampling with a temperature of about 1 leaves
the chain as it is; a grammar may force the model off it.

This module runs in the environment `llamacpp`, which has gguf and numpy, and imports nothing else.
"""

import json
import sys
from itertools import pairwise

import gguf
import numpy as np

UNKNOWN, START, END = 0, 1, 2
HEAD = 32
CONTEXT = 131_072
SURE = 4.0
"""Weight of the token that follows; it makes a logit of some 70 where the others are zero."""

Script = dict[str, dict[str, list[str]]]


def vocabulary(script: Script) -> tuple[list[bytes], list[int], dict[int, int]]:
    """Return the tokens, their types, and for each token that has one its successor."""
    kind = gguf.TokenType
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256]
    follows: dict[int, int] = {}
    for group in ("chains", "loops", "openings"):
        for start, pieces in script.get(group, {}).items():
            first = len(tokens)
            tokens += [start.encode(), *(piece.replace(" ", "\u2581").encode() for piece in pieces)]
            types += [kind.CONTROL, *[kind.NORMAL] * len(pieces)]
            follows.update(pairwise(range(first, len(tokens))))
            if group != "openings":
                follows[len(tokens) - 1] = END if group == "chains" else first + 1
    repeated = {token for token in tokens if tokens.count(token) > 1}
    if repeated:
        raise SystemExit(f"each piece can follow one other only: {sorted(repeated)}")
    return tokens, types, follows


def write(path: str, template: str, script: Script) -> None:
    """Write the model."""
    tokens, types, follows = vocabulary(script)
    count = len(tokens)
    width = -(-count // HEAD) * HEAD
    model = gguf.GGUFWriter(path, "llama")
    model.add_name("scripted")
    model.add_context_length(CONTEXT)
    model.add_embedding_length(width)
    model.add_block_count(1)
    model.add_feed_forward_length(HEAD)
    model.add_head_count(width // HEAD)
    model.add_head_count_kv(1)
    model.add_layer_norm_rms_eps(1e-5)
    model.add_rope_dimension_count(HEAD)
    model.add_vocab_size(count)
    model.add_tokenizer_model("llama")
    model.add_token_list(tokens)
    model.add_token_scores([0.0] * count)
    model.add_token_types(types)
    model.add_unk_token_id(UNKNOWN)
    model.add_bos_token_id(START)
    model.add_eos_token_id(END)
    model.add_add_bos_token(True)
    model.add_add_space_prefix(False)
    model.add_chat_template(template)

    embedding = np.zeros((count, width), np.float32)
    embedding[np.arange(count), np.arange(count)] = 1
    output = np.zeros((count, width), np.float32)
    output[list(follows.values()), list(follows)] = SURE
    model.add_tensor("token_embd.weight", embedding)
    model.add_tensor("output.weight", output)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        model.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    shapes = {
        "attn_q": (width, width),
        "attn_k": (HEAD, width),
        "attn_v": (HEAD, width),
        "attn_output": (width, width),
        "ffn_gate": (HEAD, width),
        "ffn_up": (HEAD, width),
        "ffn_down": (width, HEAD),
    }
    for name, shape in shapes.items():
        model.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, np.float32))
    model.write_header_to_file()
    model.write_kv_data_to_file()
    model.write_tensors_to_file()
    model.close()


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    write(sys.argv[1], wanted.pop("template"), wanted)
