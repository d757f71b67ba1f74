"""Credentials and metadata are read, judged honestly, and nothing is fetched because a file asks for it."""

import datetime
import io
import json
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import c2pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile

from api.judge.provenance import LONGEST
from api.judge.uploads import Upload, decode
from api.schemas.verdicts import Provenance
from trainer.file_structure import check_structure

HEIC = Path(__file__).parents[2] / "heic"
AI = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
CAMERA = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
XMP = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
xmp:CreatorTool="Editor 3"><i:DigitalSourceType>{AI}</i:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta>"""


def encoded(format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 90)).save(buffer, format=format, **options)
    return buffer.getvalue()


def provenance_of(data: bytes) -> Provenance:
    return decode(Upload("a", data), 50_000_000)[2]


@pytest.fixture(scope="module")
def signer() -> Iterator[c2pa.Signer]:
    """Signs with a fresh certificate that nobody trusts."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [
        x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
        )
        for name in ("Root", "Camera 1")
    ]
    chain = []
    for which in (1, 0):
        leaf = which == 1
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[which])
            .issuer_name(names[0])
            .public_key(keys[which].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=not leaf, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[which].public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=leaf,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=not leaf,
                    crl_sign=not leaf,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
        )
        if leaf:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=True
            )
        chain.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode())
    private = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with c2pa.Signer.from_info(c2pa.C2paSignerInfo(b"es256", "".join(chain).encode(), private, None)) as signer:
        yield signer


def signed(
    signer: c2pa.Signer,
    source_type: str,
    format: str = "JPEG",
    remote: str | None = None,
    content: bytes | None = None,
    note: str = "",
) -> bytes:
    """An image, or `content`, with a manifest that has a `note` beside what was done."""
    manifest = {
        "claim_generator_info": [{"name": "test camera"}],
        "title": "a test",
        "assertions": [
            {
                "label": "c2pa.actions.v2",
                "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": source_type}]},
            },
            {"label": "org.tests.note", "data": {"note": note}},
        ],
    }
    out = io.BytesIO()
    with c2pa.Builder(json.dumps(manifest)) as builder:
        if remote:
            builder.set_no_embed()
            builder.set_remote_url(remote)
        builder.sign(signer, f"image/{format.lower()}", io.BytesIO(content or encoded(format)), out)
    return out.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("source_type", "generated"), [(AI, True), (CAMERA, False)])
def test_a_signed_file_is_intact_its_signer_unknown(
    signer: c2pa.Signer, format: str, source_type: str, generated: bool
) -> None:
    provenance = provenance_of(signed(signer, source_type, format))
    assert provenance.c2pa is not None
    assert (provenance.c2pa.state, provenance.c2pa.issues) == ("intact", ["signingCredential.untrusted"])
    assert (provenance.c2pa.generator, provenance.c2pa.signer, provenance.c2pa.title) == (
        "test camera",
        "Camera 1",
        "a test",
    )
    assert provenance.c2pa.actions == ["c2pa.created"]
    assert provenance.c2pa.source_types == [source_type.rsplit("/", 1)[-1]]
    assert provenance.c2pa.says_generated is generated
    assert provenance.says_generated is generated


def test_the_manifest_of_a_jpeg_that_holds_two_pictures_is_read(signer: c2pa.Signer) -> None:
    pair = encoded("MPO", save_all=True, append_images=[Image.new("RGB", (64, 48), "teal")])
    data = signed(signer, AI, content=pair)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
    manifest = provenance_of(data).c2pa
    assert manifest is not None
    assert (manifest.state, manifest.says_generated) == ("intact", True)


def test_a_manifest_that_fills_several_segments_is_read_whole(signer: c2pa.Signer) -> None:
    data = signed(signer, AI, note="a" * 150_000)  # a segment holds 64 KiB
    with Image.open(io.BytesIO(data)) as image:
        assert isinstance(image, JpegImageFile)
        assert [name for name, _ in image.applist].count("APP11") == 3
    manifest = provenance_of(data).c2pa
    assert manifest is not None
    assert (manifest.state, manifest.says_generated) == ("intact", True)


def test_a_changed_pixel_breaks_the_signature(signer: c2pa.Signer) -> None:
    data = bytearray(signed(signer, CAMERA))
    data[-10] ^= 1
    manifest = provenance_of(bytes(data)).c2pa
    assert manifest is not None
    assert manifest.state == "invalid"
    assert "assertion.dataHash.mismatch" in manifest.issues


def test_a_manifest_behind_the_pixels_of_a_jpeg_is_none(signer: c2pa.Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = signed(signer, CAMERA)
    start = data.index(b"\xff\xeb")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    behind = data[:start] + data[end:-2] + data[start:end] + data[-2:]
    assert c2pa.Reader.try_create("image/jpeg", io.BytesIO(behind)) is None, "the library reads none there"
    ask = Mock()
    monkeypatch.setattr(c2pa.Reader, "try_create", ask)
    assert provenance_of(behind).c2pa is None
    assert not ask.called, "scans are not looked through"


@pytest.mark.parametrize(
    ("at", "state", "issue"),
    [(30, "unreadable", "unexpected end of file"), (400, "invalid", "assertion.hashedURI.mismatch")],
)
def test_a_broken_manifest_is_said_to_be_so(signer: c2pa.Signer, at: int, state: str, issue: str) -> None:
    """Its frame, without which nothing can be read, and what it holds, which the signature vouches for."""
    data = signed(signer, CAMERA)
    start = data.index(b"jumb") + at
    manifest = provenance_of(data[:start] + bytes(20) + data[start + 20 :]).c2pa
    assert manifest is not None
    assert manifest.state == state
    assert issue in " ".join(manifest.issues)


def test_a_link_to_a_manifest_is_reported_and_not_followed(signer: c2pa.Signer) -> None:
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        data = signed(signer, AI, remote=f"http://127.0.0.1:{server.server_port}/manifest.c2pa")
        requests.clear()
        manifest = provenance_of(data).c2pa
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert requests == []
    assert manifest is not None
    assert manifest.state == "remote"


def test_a_file_that_says_nothing() -> None:
    for format in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"):
        assert provenance_of(encoded(format)).model_dump() == {}
    assert provenance_of(HEIC.joinpath("plain.heic").read_bytes()).model_dump() == {}
    assert Provenance().model_dump_json() == "{}"


def test_generator_parameters_in_png_text() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a", zip=True)
    text.add_text("Thumb::Size", "12")
    provenance = provenance_of(encoded(pnginfo=text))
    assert provenance.metadata == {"png:parameters": "a cat Steps: 20, Sampler: Euler a"}
    assert provenance.says_generated is True


def test_what_a_phone_says() -> None:
    provenance = provenance_of(HEIC.joinpath("turned.heic").read_bytes())
    assert provenance.metadata == {"exif:Software": "phone"}
    assert provenance.says_generated is False


def test_exif_and_xmp() -> None:
    exif = Image.Exif()
    exif[0x0131] = "Midjourney 7"
    exif[0x010F] = "Acme"
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a comment"
    provenance = provenance_of(encoded("JPEG", exif=exif, xmp=XMP.encode()))
    assert provenance.metadata == {
        "exif:Software": "Midjourney 7",
        "exif:Make": "Acme",
        "exif:UserComment": "a comment",
        "xmp:CreatorTool": "Editor 3",
        "xmp:DigitalSourceType": AI,
    }
    assert provenance.says_generated is True


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
def test_generator_parameters_in_the_comment_of_a_jpeg(order: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat, été\nSteps: 20, Sampler: Euler a".encode(order)
    provenance = provenance_of(encoded("JPEG", exif=exif))
    assert provenance.metadata == {"exif:UserComment": "a cat, été Steps: 20, Sampler: Euler a"}
    assert provenance.says_generated is True


def test_iptc_fields() -> None:
    fields = b"".join(
        struct.pack(">BBBH", 0x1C, 2, number, len(value)) + value
        for number, value in ((65, b"Midjourney"), (110, b"A. Person"))
    )
    resource = b"Photoshop 3.0\0" + b"8BIM" + struct.pack(">HHL", 0x0404, 0, len(fields)) + fields
    jpeg = encoded("JPEG")
    data = jpeg[:2] + b"\xff\xed" + struct.pack(">H", 2 + len(resource)) + resource + jpeg[2:]
    provenance = provenance_of(data)
    assert provenance.metadata == {"iptc:OriginatingProgram": "Midjourney", "iptc:Credit": "A. Person"}
    assert provenance.says_generated is True


def test_an_ordinary_editor_is_no_generator() -> None:
    exif = Image.Exif()
    exif[0x0131] = "GIMP 3.0"
    assert provenance_of(encoded("JPEG", exif=exif)).says_generated is False


@pytest.mark.parametrize(
    "xmp",
    [
        b"<!DOCTYPE a [<!ENTITY b 'bb'><!ENTITY c '&b;&b;&b;'>]><a>&c;</a>",
        b"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a Software='&x;'>&x;</a>",
        b"<unclosed",
        b"\xff\xfe\x00",
    ],
)
def test_hostile_xmp_gives_nothing(xmp: bytes) -> None:
    assert provenance_of(encoded("JPEG", xmp=xmp)).metadata is None


def test_long_and_unprintable_fields_are_shortened() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "x\x07" * 5000)
    metadata = provenance_of(encoded(pnginfo=text)).metadata
    assert metadata is not None
    value = metadata["png:Software"]
    assert len(value) == LONGEST
    assert value.isprintable()


@pytest.mark.filterwarnings("ignore")  # as in the processes that decode uploads
@pytest.mark.parametrize("cut", [3, 10, 30, 60])
def test_truncated_metadata_do_not_raise(cut: int) -> None:
    exif = Image.Exif()
    exif[0x0131] = "x" * 100
    provenance_of(encoded("JPEG", exif=exif.tobytes()[:cut]))


def test_text_behind_the_pixels_of_a_png_counts() -> None:
    data, text = encoded(), b"tEXtparameters\0a cat"
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    assert provenance_of(data[:-12] + chunk + data[-12:]).metadata == {"png:parameters": "a cat"}


def test_an_upload_is_checked_and_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG without EXIF too, which may follow behind its pixels."""
    check = Mock(wraps=check_structure)
    load = Mock(wraps=PngImagePlugin.PngImageFile.load_prepare)
    monkeypatch.setattr("trainer.images.check_structure", check)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", lambda image: load(image))
    assert provenance_of(encoded()).metadata is None
    assert (check.call_count, load.call_count) == (1, 1)
