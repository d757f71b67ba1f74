"""What a file says of its own making: Content Credentials (C2PA) and generator metadata.

Such statements are easily removed, and all but a valid signature easily forged, so they stand beside the verdict and
never enter the score. Nothing is fetched from the network, whatever links the file holds.
"""

import io
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal
from xml.etree.ElementTree import ParseError

import c2pa
import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException
from PIL import ExifTags, Image, ImageFile, IptcImagePlugin
from PIL.JpegImagePlugin import JpegImageFile

from api.schemas.verdicts import ContentCredentials, Provenance
from trainer.images import read_exif

LONGEST = 500
"""Characters kept of one field."""
MOST_XMP = 1_000_000
"""Bytes; a larger packet is not parsed."""
C2PA_MARKS = (b"c2pa", b"provenance")
"""Without any of these bytes a file holds no manifest, whose label is c2pa, and no link to one (dcterms:provenance)."""
GENERATED_TYPES = ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia")
GENERATORS = re.compile(
    r"midjourney|dall[-·. ]?e\b|stable[ -]?diffusion|comfyui|automatic1111|invokeai|novelai|firefly|imagen\b|ideogram"
    r"|leonardo\.ai|flux\.1|playground[ -]?v|gpt-4o|gpt-image|chatgpt|openai|made with google ai|sdxl|diffusers"
    r"|steps: \d+, sampler: ",
    re.IGNORECASE,
)
PROMPT_FIELDS = frozenset(
    {"parameters", "prompt", "workflow", "dream", "sd-metadata", "invokeai_metadata", "generation_data"}
)
"""PNG text that only image generators write."""
TEXT_FIELDS = PROMPT_FIELDS | {"software", "comment", "description", "title", "source", "author", "usercomment"}
XMP_FIELDS = {"CreatorTool", "DigitalSourceType", "Credit", "AISystemUsed", "AIPromptInformation", "Software"}
EXIF_FIELDS = {"Software", "ImageDescription", "Artist", "Make", "Model", "HostComputer", "DateTime"}
IPTC_FIELDS = {(2, 65): "OriginatingProgram", (2, 110): "Credit", (2, 115): "Source", (2, 120): "Caption"}


def read_provenance(image: Image.Image, format: str, data: bytes) -> Provenance:
    """Credentials and metadata of an image file; both absent where it says nothing.

    Args:
        image: As `open_image` gives it, decoded: the fields behind a PNG's pixels are known then.
        format: Its format, likewise.
        data: The file, whose metadata may be broken on purpose.
    """
    metadata = read_metadata(image)
    credentials = read_credentials(image, format, data)
    if credentials is None and not metadata:
        return Provenance()
    generated = says_generated(metadata) or (credentials is not None and credentials.says_generated)
    return Provenance(c2pa=credentials, metadata=metadata or None, says_generated=generated)


def says_generated(metadata: dict[str, str]) -> bool:
    """Whether a field names a generator, its prompt, or a source type that means one."""
    for name, value in metadata.items():
        kind, _, field = name.partition(":")
        if value.rstrip("/").endswith(GENERATED_TYPES) or GENERATORS.search(value):
            return True
        if kind == "png" and field.lower() in PROMPT_FIELDS:
            return True
    return False


@lru_cache(maxsize=1)
def _offline() -> c2pa.Context:
    """A context that fetches nothing: by default the reader follows links that the file names."""
    return c2pa.Context(c2pa.Settings.from_dict({"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}))


def read_credentials(image: Image.Image, format: str, data: bytes) -> ContentCredentials | None:
    """The active C2PA manifest of a file, with what its validation found; None where there is none.

    That of a JPEG stands in segments before its pixels, which opening it has read already.

    Args:
        image: As `open_image` gives it.
        format: Its format, likewise.
        data: The file.
    """
    parts = [segment for _, segment in image.applist] if isinstance(image, JpegImageFile) else [data]
    if format == "BMP" or not any(mark in part for part in parts for mark in C2PA_MARKS):
        return None
    try:
        reader = c2pa.Reader.try_create(f"image/{format.lower()}", io.BytesIO(data), context=_offline())
        if reader is None:
            return None
        with reader:
            return _summary(json.loads(reader.json()))
    except c2pa.C2paError as error:
        remote = "remote" in f"{type(error).__name__} {error}".lower()
        return ContentCredentials(state="remote" if remote else "unreadable", issues=[_short(error)])
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # JSON of another shape than ever seen
        return ContentCredentials(state="unreadable", issues=[_short(error)])


def _summary(store: dict[str, Any]) -> ContentCredentials:
    manifest = store.get("manifests", {}).get(store.get("active_manifest"), {})
    signature = manifest.get("signature_info") or {}
    actions, types = [], []
    for assertion in manifest.get("assertions", []):
        if str(assertion.get("label", "")).startswith("c2pa.actions"):
            for action in assertion["data"].get("actions", []):
                actions.append(_short(action.get("action", "")))
                if source_type := action.get("digitalSourceType"):
                    types.append(_short(str(source_type).rstrip("/").rsplit("/", 1)[-1]))
    states: dict[str, Literal["trusted", "intact"]] = {"Trusted": "trusted", "Valid": "intact"}
    generators = manifest.get("claim_generator_info") or [{}]
    return ContentCredentials(
        state=states.get(str(store.get("validation_state")), "invalid"),
        issues=[_short(status.get("code", "")) for status in store.get("validation_status") or []],
        generator=_short(generators[0].get("name") or manifest.get("claim_generator") or "") or None,
        signer=_short(signature.get("common_name") or signature.get("issuer") or "") or None,
        signed_at=_short(signature.get("time") or "") or None,
        title=_short(manifest.get("title") or "") or None,
        actions=actions,
        source_types=types,
        says_generated=any(kind in GENERATED_TYPES for kind in types),
    )


def read_metadata(image: Image.Image) -> dict[str, str]:
    """Fields that tell of a file's making, by `png:`, `exif:`, `xmp:` or `iptc:` and name, each at most 500 characters.

    Args:
        image: As `open_image` gives it, decoded.
    """
    texts: dict[str, str] = {}
    for read in (_text_fields, _exif_fields, _xmp_fields, _iptc_fields):
        try:
            texts.update((name, value) for name, value in read(image) if value)
        except Exception:  # parsers fail in every way on bytes that were made to break them
            texts[f"{read.__name__.split('_')[1]}:error"] = "could not be read"
    return texts


def _text_fields(image: Image.Image) -> Iterator[tuple[str, str]]:
    for name, value in image.info.items():
        if isinstance(name, str) and name.lower() in TEXT_FIELDS and isinstance(value, str | bytes):
            kind = "png" if image.format == "PNG" else "file"
            yield f"{kind}:{name}", _short(value)


def _exif_fields(image: Image.Image) -> Iterator[tuple[str, str]]:
    exif = read_exif(image)
    for tag, value in exif.items():
        name = ExifTags.TAGS.get(tag)
        if name in EXIF_FIELDS:
            yield f"exif:{name}", _short(value)
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(comment, bytes):  # eight bytes name the character set
        charset, text = comment[:8], comment[8:]
        yield "exif:UserComment", _short(_utf16(text) if charset.startswith(b"UNICODE") else text)
    elif comment:
        yield "exif:UserComment", _short(comment)


def _xmp_fields(image: Image.Image) -> Iterator[tuple[str, str]]:
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    packet = packet.encode() if isinstance(packet, str) else packet
    if not packet or len(packet) > MOST_XMP:
        return
    try:
        root = defusedxml.ElementTree.fromstring(packet.rstrip(b"\0 \n\r\t"))
    except (ParseError, DefusedXmlException, ValueError):
        return
    for element in root.iter():
        pairs = [(element.tag, element.text or ""), *element.attrib.items()]
        for name, value in pairs:
            local = str(name).rsplit("}", 1)[-1]
            if local in XMP_FIELDS and value.strip():
                yield f"xmp:{local}", _short(value)


def _iptc_fields(image: Image.Image) -> Iterator[tuple[str, str]]:
    info = (IptcImagePlugin.getiptcinfo(image) if isinstance(image, ImageFile.ImageFile) else None) or {}
    for key, name in IPTC_FIELDS.items():
        value = info.get(key)
        if value:
            yield f"iptc:{name}", _short(value[0] if isinstance(value, list) else value)


def _utf16(text: bytes) -> str:
    """Of both byte orders the one that reads as text: writers follow the file's, or big-endian whatever that is."""
    both = (text.decode(order, "replace") for order in ("utf-16-be", "utf-16-le"))
    return max(both, key=lambda read: sum(map(str.isascii, read)))


def _short(value: object) -> str:
    """Printable text of at most `LONGEST` characters."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    text = "".join(c if c.isprintable() else " " for c in text[: 4 * LONGEST]).strip()
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
