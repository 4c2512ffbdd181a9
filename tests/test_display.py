from dpo_helpers.show.tables import html_table, show_masks, show_text
from dpo_helpers.tokens import EncodedPair


def test_a_table_literally():
    assert html_table([{"a": 1.23456, "b": "x\ny"}, {"a": 2, "b": "<"}]) == (
        '<table class="dpo mathjax_ignore tex2jax_ignore"><thead><tr><th>a</th><th>b</th></tr></thead><tbody>'
        "<tr><td>1.235</td><td>x<br>y</td></tr><tr><td>2</td><td>&lt;</td></tr></tbody></table>"
    )


def test_show_text_neutralises_terminal_escapes(capsys):
    show_text("title", "\n\nHuman: \x1b]0;evil\x07")
    assert capsys.readouterr().out == "title:\n    Human: \\x1b]0;evil\\x07\n"


def test_masks_name_every_token_and_score_the_response(capsys):
    class Letters:
        def decode(self, ids):
            return "".join(chr(96 + i) for i in ids)

    show_masks(EncodedPair([1, 2], [3, 4], [5]), Letters())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in lines[1:]] == [
        ["1", "-", "'a'"], ["2", "-", "'b'"], ["3", "yes", "'c'"], ["4", "yes", "'d'"],
    ]  # fmt: skip
