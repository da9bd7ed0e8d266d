"""What is sent: a form read as it arrives, within limits, and the picture in it looked at before it waits.

request --multipart--> text fields, and the picture as a file in the private folder --checked--> size
"""

import pathlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from faithdiff_jax.errors import InputError, shown
from faithdiff_jax.files import images
from faithdiff_jax.files.captions import OF_TILES
from faithdiff_jax.files.reading import printable

PICTURE = "picture"
"""The field that holds the picture."""
LONGEST_FIELD = 2**14
"""In bytes, of a field of text; the text encoders read about 300 letters of a caption."""
LONGEST_OF: Mapping[str, int] = {OF_TILES: 2**18}
"""Fields that may be longer."""
MOST_FIELDS = 64
LONGEST_NAME = 80
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
"""What is read of those who are not known: Pillow opens many more, by decoders that few look after."""


class NotAForm(InputError):
    """A request that is no form with a picture."""


class Form:
    """A multipart form, of which the picture goes to a file.

    Attributes:
        fields: name -> text of the other fields.
        name: what the sender calls the picture; empty until there is one.
    """

    def __init__(self, target: pathlib.Path, content_type: str):
        """Begin to read; NotAForm for another type of content."""
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import MultipartParser, parse_options_header

        kind, parameters = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not parameters.get(b"boundary"):
            raise NotAForm(f"content-type is {shown(content_type)}: must be multipart/form-data with a boundary")
        self.fields: dict[str, str] = {}
        self.name = ""
        self._target = target
        self._file: Any = None
        self._field, self._text = "", bytearray()
        self._header, self._value = bytearray(), bytearray()
        self._headers: dict[str, bytes] = {}
        self._ended = False
        callbacks = {
            "on_part_begin": self._headers.clear,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_part,
            "on_part_data": self._take,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        self._options_of = parse_options_header
        try:
            self._parser = MultipartParser(parameters[b"boundary"], callbacks)  # type: ignore[arg-type]
        except FormParserError as error:
            raise _broken(error) from None

    async def read(self, stream: AsyncIterator[bytes]) -> None:
        """Read all of it; how much that may be is the matter of `guard`.

        Raises:
            NotAForm: not a form, without a picture or with two, a field twice, or one that is too long.
        """
        from python_multipart.exceptions import FormParserError

        try:
            async for chunk in stream:
                self._parser.write(chunk)
            self._parser.finalize()
        except FormParserError as error:
            raise _broken(error) from None
        finally:
            if self._file is not None:
                self._file.close()
        if not self._ended:
            raise NotAForm("not a whole multipart form: it ends too early")
        if not self.name:
            raise NotAForm(f"{PICTURE} is missing: send the picture as a file under this name")

    def _end_header(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _begin_part(self) -> None:
        _, options = self._options_of(self._headers.get("content-disposition", b""))
        self._field = _text(options.get(b"name", b""), "name of a field")
        self._text.clear()
        if not self._field:
            raise NotAForm("a field without a name: every field needs one")
        if self._field in self.fields or (self._field == PICTURE and self.name):
            raise NotAForm(f"{_short(self._field)}: is given twice, give it once")
        if len(self.fields) >= MOST_FIELDS:
            raise NotAForm(f"too many fields, at most {MOST_FIELDS} are read")
        if self._field == PICTURE:
            if b"filename" not in options:
                raise NotAForm(f"{PICTURE}: must be a file, not text")
            self.name = _short(_text(options[b"filename"], "name of the file")) or PICTURE
            self._file = self._target.open("xb")
        elif b"filename" in options:
            raise NotAForm(f"{_short(self._field)}: must be text, not a file")

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._field == PICTURE:
            self._file.write(data[start:end])
            return
        self._text.extend(data[start:end])
        limit = LONGEST_OF.get(self._field, LONGEST_FIELD)
        if len(self._text) > limit:
            raise NotAForm(f"{_short(self._field)}: is too long, at most {limit:,} bytes are read")

    def _end_part(self) -> None:
        if self._field != PICTURE:
            self.fields[self._field] = _text(self._text, _short(self._field))

    def _end(self) -> None:
        self._ended = True


def check_picture(path: pathlib.Path, name: str, most_pixels: int) -> tuple[int, int]:
    """Height and width of a picture, of which everything is decoded to see that it can be.

    Raises:
        InputError: as `images.load_image`, with the sender's name of the picture.
    """
    height, width = read_picture(path, name, most_pixels).rgb.shape[:2]
    return height, width


def read_picture(path: pathlib.Path, name: str, most_pixels: int = images.MAX_PIXELS) -> images.Picture:
    """`images.load_image` of a file that has another name for people."""
    try:
        return images.load_image(path, most_pixels, FORMATS)
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from error


def _broken(error: Exception) -> NotAForm:
    return NotAForm(f"not a multipart form ({' '.join(str(error).split())})")


def _text(data: bytes | bytearray, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotAForm(f"{name}: is not UTF-8 (byte {error.start})") from None


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}..."
