"""What messages may contain, whatever names lead into them."""

import pickle

from utils.errors import DataError, UserError


def test_control_codes_and_broken_unicode_are_shown_as_escapes():
    error = DataError("a\x1b[2Jb\x07 \udcff \u202e file é\nsecond line")
    assert str(error) == "a\\x1b[2Jb\\x07 \\udcff \\u202e file é\nsecond line"
    str(error).encode()
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as it comes back from a data worker


def test_endless_words_are_shortened_and_long_paths_are_not():
    path = "/data/" + "folder/" * 50
    text = str(UserError(f"{path} lists {'9' * 5000} twice"))
    assert text.startswith(path) and text.endswith(" twice") and "9...9" in text and len(text) < 900


def test_a_data_error_keeps_what_is_wrong_apart_from_what_helps():
    error = DataError("a.h5 is \x07missing", fix="Get it: bash data/download_data.sh")
    assert str(error) == "a.h5 is \\x07missing. Get it: bash data/download_data.sh"
    assert error.problem == "a.h5 is \\x07missing" and DataError("plain").problem == str(DataError("plain")) == "plain"
