"""Seeded mutations of right input: of bytes, of text, of the values of JSON, of tensors, of command lines."""

import copy
import json
import re

import torch
from safetensors.torch import load, save

from upperson.model.tensor_files import with_checksums

VALUES = [
    "NaN",
    "-Infinity",
    "1e999",
    "-0",
    str(10**20),
    "1" * 500,
    "9" * 5000,
    "1.5",
    "null",
    "true",
    "[]",
    "{}",
    '""',
] + [r'"\ud83d"', r'"\u0000"', '" "', '"nan"', '"a"', '["a"]', '{"raw": "x"}', '"../x"', f'"{"a" * 6000}"', "[" * 5000]
MARKS = [";", "\t", '"', "\0", "\\", "\ufeff", "é", "[", "{" * 3000, "\r", ",", "\n", "\x1b", "\ud83d"]
VALUE = re.compile(r'"[^"\n]*"|-?\d[\d.e-]*|[\[{]')
# Values for a field of JSON. The texts of VALUES, which stand for more than JSON can say, come on top.
OTHERS = [None, True, False, 0, -1, 1, 3, 7, -(10**6), 10**6, 2**31, 2**63, 10**30, 0.5, -2.5, 1e300, float("nan")]
OTHERS += [float("inf"), "", "x", "none", "1", "a\nb", "\udcff", "/", [], [1], [2, 2], ["x"], {}, {"x": 1}, [[]]]
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64]
ARGUMENTS = [
    "",
    " ",
    "-1",
    "0",
    "1",
    "2",
    "1.5",
    "1e9",
    "1e999",
    "nan",
    "x",
    "none",
    "--",
    "-x",
    "--x",
    "--x=1",
    "=",
    "é",
]
ARGUMENTS += ["9" * 5000, "1" * 30, "a\nb", "\udcff", "a" * 5000, "missing/x", "/dev/null", "/proc/x", "cuda:99", "{}"]


def mutated_bytes(content, generator):
    content = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 5, 20])):
        place = generator.randrange(min(len(content), generator.choice([60, 300, len(content)])))
        change = generator.randrange(7)
        if change == 0:
            content[place] = generator.randrange(256)
        elif change == 1:
            content[place : place + 4] = generator.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
        elif change == 2:
            content[place:place] = generator.randbytes(9)
        elif change == 3:
            content[place] ^= 1 << generator.randrange(8)
        elif change == 4:
            content[place:place] = content[place : place + generator.choice([4, 100])]
        elif change == 5:
            content += generator.choice([b"\0", b"\n", generator.randbytes(50)])
        else:
            del content[place + 1 : generator.choice([place + 9, None])]
    return bytes(content)


def mutated_text(text, generator):
    for _ in range(generator.choice([1, 1, 2, 4])):
        place = generator.randrange(len(text) + 1)
        values = list(VALUE.finditer(text))
        change = generator.randrange(5)
        if change < 3 and values:
            value = generator.choice(values)
            text = text[: value.start()] + generator.choice(VALUES) + text[value.end() :]
        elif change == 3:
            text = text[:place] + generator.choice(MARKS) + text[place:]
        else:
            text = text[:place] + text[generator.choice([place + 5, len(text)]) :]
    encoding = generator.choice(["utf-8"] * 9 + ["utf-16", "cp1252", "utf-8-sig"])
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf-8") else "replace")


def places(tree, path=()):
    """The path of every value in a tree of JSON but the tree itself."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in inner for found in ((*path, key), *places(value, (*path, key)))]


def mutated_tree(tree, generator):
    """A copy of a tree of JSON with one value removed, renamed, repeated or replaced, and the path of that value."""
    tree = copy.deepcopy(tree)
    path = generator.choice(places(tree))
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    key, change = path[-1], generator.randrange(8)
    if change == 0:
        del inner[key]
    elif change == 1 and isinstance(inner, dict):
        inner[f"{key}{generator.choice(['x', ' ', 'é'])}"] = inner.pop(key)
    elif change == 2 and isinstance(inner, list):
        inner.insert(key, inner[key])
    else:
        inner[key] = generator.choice(OTHERS)
    return tree, path


def mutated_json(tree, generator):
    """The bytes of a tree that is mutated in a value, in its text or in its bytes; the path of the value, or ()."""
    change = generator.randrange(4)
    if change == 0:
        return mutated_bytes(json.dumps(tree).encode(), generator), ()
    if change == 1:
        return mutated_text(json.dumps(tree), generator), ()
    tree, path = mutated_tree(tree, generator)
    return json.dumps(tree).encode(), path


def mutated_tensors(tensors, generator):
    """Some tensors with one dropped, added, renamed or changed, and its name."""
    tensors = dict(tensors)
    name = generator.choice(sorted(tensors))
    tensor, change = tensors[name], generator.randrange(9)
    if change == 0:
        del tensors[name]
    elif change == 1:
        tensors[f"{name}.x"] = tensors.pop(name)
    elif change == 2:
        name = generator.choice(["x", "", "é" * 300, "a\nb"])
        tensors[name] = tensor.clone()
    elif change == 3:
        tensors[name] = tensor.to(generator.choice(DTYPES))
    elif change == 4:
        shape = generator.choice([(), (0,), (1, *tensor.shape), (3, 5), tensor.shape[::-1]])
        tensors[name] = torch.zeros(shape, dtype=tensor.dtype)
    elif change in (5, 6) and tensor.is_floating_point() and tensor.numel():
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[generator.randrange(tensor.numel())] = generator.choice([float("nan"), float("inf")])
    else:
        tensors[name] = torch.full_like(tensor, generator.choice([0, 1, 100]))
    return tensors, name


def parts_of(content):
    """The header of a safetensors file as a tree of JSON, and the bytes of its tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def with_header(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text, data


def mutated_safetensors(content, generator):
    """The bytes of a mutated safetensors file, and the name of the one tensor that was changed, or ""."""
    header, data = parts_of(content)
    change = generator.randrange(7)
    if change == 0:
        return mutated_bytes(content, generator), ""
    if change == 1:  # a length that lies
        length = generator.choice([0, 1, len(content), 2**31, 2**63, 2**64 - 1, generator.randrange(2000)])
        return length.to_bytes(8, "little") + content[8:], ""
    if change == 2:
        return b"".join(with_header(mutated_text(json.dumps(header), generator), data)), ""
    if change == 3:
        return b"".join(with_header(mutated_tree(header, generator)[0], data)), ""
    metadata = header.get("__metadata__")
    if change == 4 and metadata:
        key = generator.choice(sorted(metadata))
        text = metadata[key]
        if generator.random() < 0.7 and text[:1] in "{[" and places(json.loads(text)):
            metadata[key] = json.dumps(mutated_tree(json.loads(text), generator)[0])
        else:
            metadata[key] = mutated_text(text, generator).decode(errors="replace")
        return b"".join(with_header(header, data)), ""
    tensors, name = mutated_tensors(load(content), generator)
    return save(tensors, metadata), name


def signed(content):
    """A safetensors file with right checksums; bytes that are not such a file as they are."""
    try:
        metadata, tensors = parts_of(content)[0].get("__metadata__"), load(content)
    except Exception:  # of any type
        return content
    return save(tensors, with_checksums(tensors, metadata)) if metadata else content


def mutated_arguments(arguments, generator):
    """A command line with some arguments replaced, dropped, repeated, added or swapped."""
    arguments = list(arguments)
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        place, change = generator.randrange(len(arguments) + 1), generator.randrange(6)
        if change < 2 and place < len(arguments):
            arguments[place] = generator.choice(ARGUMENTS)
        elif change == 2:
            del arguments[place : place + generator.choice([1, 2])]
        elif change == 3:
            arguments[place:place] = arguments[place : place + 2]
        elif change == 4:
            arguments.insert(place, generator.choice(ARGUMENTS))
        else:
            arguments[place : place + 2] = arguments[place : place + 2][::-1]
    return arguments
