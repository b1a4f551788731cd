"""Offsets of tokens in the text: answers worked by hand, then properties over random ids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rollout.offsets import OffsetMapper

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and then the dog sleeps in the sun",
    "le café est fermé à midi; über Öl läuft's heiß, señor: ¿qué?",
    "東京は今日も雨です。日本の天気、日本の電車",
    "😀 😃 😀👍🏽 👩‍👩‍👧 flags 🇫🇷🇩🇪 and e\u0301 combining",
    "x = [i ** 2 for i in range(10)]\n\tif x: return None\r\n",
]


@pytest.fixture(scope="module")
def bytes_only() -> PreTrainedTokenizerFast:
    """One token per byte, the pairs `th` and `the`, added tokens and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["th", "the", "Ã©", "ðŁ", "ĺĢ"]  # the last three: é, and the two halves of an emoji
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, *pairs])}
    merges = [("t", "h"), ("th", "e"), ("Ã", "©"), ("ð", "Ł"), ("ĺ", "Ģ")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("日本", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens(["<tool>", "雨"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_tokens(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    """The id of each single byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in data]
    return tokenizer.convert_tokens_to_ids(symbols)


def mapped(tokenizer, ids) -> tuple[str, list[tuple[int, int]]]:
    text, offsets = OffsetMapper(tokenizer)(ids)
    assert offsets.dtype == np.int64 and offsets.shape == (len(ids), 2)
    return text, [tuple(row) for row in offsets.tolist()]


class TestByteLevel:
    def test_ascii(self, bytes_only):
        ids = bytes_only.convert_tokens_to_ids(["the", "Ġ", "c", "a", "t"])
        assert mapped(bytes_only, ids) == ("the cat", [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)])

    def test_an_accent_in_one_token_and_split_over_two(self, bytes_only):
        whole = bytes_only.convert_tokens_to_ids(["n", "Ã©", "e"])
        assert mapped(bytes_only, whole) == ("née", [(0, 1), (1, 2), (2, 3)])
        split = byte_tokens(bytes_only, "née".encode())
        assert mapped(bytes_only, split) == ("née", [(0, 1), (1, 2), (1, 2), (2, 3)])

    @pytest.mark.parametrize("pieces", [2, 3, 4])
    def test_an_emoji_split_over_tokens(self, bytes_only, pieces):
        single = byte_tokens(bytes_only, "😀".encode())
        left, right = bytes_only.convert_tokens_to_ids(["ðŁ", "ĺĢ"])  # two bytes each
        ids = {2: [left, right], 3: [left, *single[2:]], 4: single}[pieces]
        assert mapped(bytes_only, ids) == ("😀", [(0, 1)] * pieces)

    def test_a_joined_family_is_five_code_points(self, bytes_only):
        text = "👩\u200d👩\u200d👧"  # 4 + 3 + 4 + 3 + 4 bytes
        places = [(0, 1)] * 4 + [(1, 2)] * 3 + [(2, 3)] * 4 + [(3, 4)] * 3 + [(4, 5)] * 4
        assert mapped(bytes_only, byte_tokens(bytes_only, text.encode())) == (text, places)

    def test_a_lone_continuation_byte_is_one_replacement(self, bytes_only):
        ids = byte_tokens(bytes_only, b"a\x80b")
        assert mapped(bytes_only, ids) == ("a\ufffdb", [(0, 1), (1, 2), (2, 3)])

    def test_a_cut_character_is_one_replacement_for_all_its_bytes(self, bytes_only):
        ids = byte_tokens(bytes_only, b"a\xf0\x9f\x98")  # three of four bytes of an emoji, then the response ends
        assert mapped(bytes_only, ids) == ("a\ufffd", [(0, 1), (1, 2), (1, 2), (1, 2)])
        ids = byte_tokens(bytes_only, b"\xe0\x80\x80")  # overlong: no byte continues another
        assert mapped(bytes_only, ids) == ("\ufffd" * 3, [(0, 1), (1, 2), (2, 3)])

    def test_specials_are_empty_where_they_stand(self, bytes_only):
        eos = bytes_only.eos_token_id
        ids = [eos, *byte_tokens(bytes_only, b"ab"), eos, *byte_tokens(bytes_only, b"c"), eos]
        assert mapped(bytes_only, ids) == ("abc", [(0, 0), (0, 1), (1, 2), (2, 2), (2, 3), (3, 3)])

    def test_a_special_within_a_character_stands_at_its_start(self, bytes_only):
        ids = byte_tokens(bytes_only, "xé".encode())
        ids.insert(2, bytes_only.eos_token_id)
        assert mapped(bytes_only, ids) == ("xé", [(0, 1), (1, 2), (1, 1), (1, 2)])

    def test_only_eos(self, bytes_only):
        assert mapped(bytes_only, [bytes_only.eos_token_id]) == ("", [(0, 0)])

    def test_nothing(self, bytes_only):
        assert mapped(bytes_only, []) == ("", [])

    def test_added_tokens_are_literal_text(self, bytes_only):
        ids = [*bytes_only.convert_tokens_to_ids(["<tool>", "日本"]), *byte_tokens(bytes_only, b"!")]
        assert mapped(bytes_only, ids) == ("<tool>日本!", [(0, 6), (6, 8), (8, 9)])

    def test_ids_beyond_the_vocabulary_are_empty(self, bytes_only):
        """Embedding matrices are padded, and an untrained policy samples from the padding."""
        a, b = byte_tokens(bytes_only, b"ab")
        assert mapped(bytes_only, [a, 5000, b]) == ("ab", [(0, 1), (1, 1), (1, 2)])

    def test_ids_may_be_an_array(self, bytes_only):
        ids = np.array(byte_tokens(bytes_only, b"ab"), dtype=np.int32)
        assert OffsetMapper(bytes_only)(ids)[1].tolist() == [[0, 1], [1, 2]]

    def test_agrees_with_the_offsets_of_encoding(self, trained):
        """Independent code: where encoding text yields these ids, the tokenizer itself knows their places."""
        for text in CORPUS:
            encoding = trained(text, return_offsets_mapping=True)
            _, places = mapped(trained, encoding["input_ids"])
            # Its offsets trim the leading space of a word, ours count every code point.
            assert [stop for _, stop in places] == [stop for _, stop in encoding["offset_mapping"]]

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_properties_of_random_ids(self, trained, data):
        ids = data.draw(st.lists(st.integers(0, len(trained) + 2), max_size=40))
        text, offsets = OffsetMapper(trained)(ids)
        start, stop = offsets[:, 0], offsets[:, 1]
        filled = stop > start
        assert text == trained.decode(ids, skip_special_tokens=True)
        assert (np.diff(start) >= 0).all() and (np.diff(stop[filled]) >= 0).all() and (start <= stop).all()
        assert set().union(*(range(a, b) for a, b in offsets)) == set(range(len(text)))
        # Neighbours share at most one character, the split one; without repeats the slices make up the text.
        assert (start[filled][1:] >= stop[filled][:-1] - 1).all()
        rebuilt, done = "", 0
        for a, b in offsets[filled]:
            rebuilt += text[max(a, done) : b]
            done = b
        assert rebuilt == text
        for t, token_id in enumerate(ids):
            alone = trained.decode([token_id], skip_special_tokens=True)
            if alone and "\ufffd" not in alone:  # whole characters: the slice is the token
                assert text[start[t] : stop[t]] == alone
            if token_id == trained.eos_token_id:
                assert not filled[t]

    @settings(max_examples=300, deadline=None)
    @given(text=st.text(st.sampled_from("a \né\u0301\u200d\ufffd€日😀👍🏽\U0010ffff"), max_size=12))
    def test_every_token_of_a_split_character_has_its_range(self, bytes_only, text):
        expected = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
        assert mapped(bytes_only, byte_tokens(bytes_only, text.encode())) == (text, expected)

    @settings(max_examples=300, deadline=None)
    @given(row=st.binary(max_size=12))
    def test_invalid_bytes_decode_as_the_tokenizer_does(self, bytes_only, row):
        text, places = mapped(bytes_only, byte_tokens(bytes_only, row))
        assert text == row.decode(errors="replace")
        assert [row[t] for t, (a, b) in enumerate(places) if text[a:b].isascii()] == [b for b in row if b < 128]


def sentence_piece(decoder) -> PreTrainedTokenizerFast:
    """Llama-2 in small: ▁ is a space, unknown characters are spelled in <0x..> tokens."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁cd", "é", "▁▁"]
    model = models.Unigram([(piece, -1.0) for piece in vocab], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    tokenizer.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


REPLACE_FALLBACK_FUSE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
LLAMA_2 = decoders.Sequence([*REPLACE_FALLBACK_FUSE, decoders.Strip(" ", 1, 0)])
GEMMA = decoders.Sequence(REPLACE_FALLBACK_FUSE)


def ids_of(tokenizer, *tokens: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(tokens))


class TestSentencePiece:
    def test_the_first_space_is_stripped_for_llama_and_kept_for_gemma(self):
        llama, gemma = sentence_piece(LLAMA_2), sentence_piece(GEMMA)
        ids = ids_of(llama, "<s>", "▁a", "b", "▁cd", "</s>")
        assert mapped(llama, ids) == ("ab cd", [(0, 0), (0, 1), (1, 2), (2, 5), (5, 5)])
        assert mapped(gemma, ids) == (" ab cd", [(0, 0), (0, 2), (2, 3), (3, 6), (6, 6)])

    def test_a_token_stripped_away_is_empty(self):
        llama = sentence_piece(LLAMA_2)
        assert mapped(llama, ids_of(llama, "▁", "b", "▁")) == ("b ", [(0, 0), (0, 1), (1, 2)])

    def test_byte_tokens_share_their_character(self):
        llama = sentence_piece(LLAMA_2)
        ids = ids_of(llama, "▁a", "<0xE2>", "<0x82>", "<0xAC>", "b", "<0x0A>")
        assert mapped(llama, ids) == ("a€b\n", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (3, 4)])

    def test_a_special_token_does_not_end_a_run_of_bytes(self):
        llama = sentence_piece(LLAMA_2)
        ids = ids_of(llama, "<0xC3>", "</s>", "<0xA9>")
        assert mapped(llama, ids) == ("é", [(0, 1), (0, 0), (0, 1)])

    def test_each_byte_of_an_invalid_run_is_one_replacement(self):
        """Unlike byte-level BPE: this decoder gives up the whole run, even the good character in it."""
        llama = sentence_piece(LLAMA_2)
        ids = ids_of(llama, "<0xC3>", "<0xA9>", "<0xC3>", "b")
        assert mapped(llama, ids) == ("\ufffd\ufffd\ufffdb", [(0, 1), (1, 2), (2, 3), (3, 4)])

    def test_metaspace(self):
        t5 = sentence_piece(decoders.Metaspace("▁", "always"))
        assert mapped(t5, ids_of(t5, "▁a", "b", "▁▁", "▁cd")) == ("ab   cd", [(0, 1), (1, 2), (2, 4), (4, 7)])

    @pytest.mark.parametrize(
        "decoder",
        [
            LLAMA_2,
            GEMMA,
            decoders.Metaspace("▁", "always"),
            decoders.Metaspace("▁", "never"),
            decoders.Sequence([*REPLACE_FALLBACK_FUSE, decoders.Strip(" ", 2, 0)]),
            decoders.WordPiece("##", True),
            decoders.ByteLevel(),
            None,
        ],
        ids=["llama", "gemma", "metaspace", "metaspace-never", "strip-two", "wordpiece", "bytelevel", "none"],
    )
    def test_text_and_cover_of_random_ids(self, decoder):
        """Drawn from a few ids so that runs of bytes, good and bad, and runs of spaces occur."""
        tokenizer = sentence_piece(decoder) if decoder is not None else sentence_piece(decoders.Fuse())
        if decoder is None:
            tokenizer.backend_tokenizer.decoder = None
        mapper = OffsetMapper(tokenizer)
        some = ids_of(tokenizer, "</s>", "▁", "▁a", "b", "é", "▁▁", "<tool>", "<0xC3>", "<0xA9>", "<0x20>", "<0xE2>")
        rng = np.random.default_rng(0)
        for _ in range(300):
            ids = rng.choice(some, size=rng.integers(0, 9)).tolist()
            text, offsets = mapper(ids)
            assert text == tokenizer.decode(ids, skip_special_tokens=True)
            assert (np.diff(offsets[:, 0]) >= 0).all()
            assert set().union(*(range(a, b) for a, b in offsets)) == set(range(len(text)))


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[CLS]", "[SEP]", "play", "##ing", "don", "'", "t", ".", "café", "n't", "x ."]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece("##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", sep_token="[SEP]", clean_up_tokenization_spaces=True
    )


class TestWordPiece:
    def test_known_answer(self, bert):
        ids = ids_of(bert, "café", "play", "##ing", ".", "[SEP]")
        assert mapped(bert, ids) == ("café playing.", [(0, 4), (4, 9), (9, 12), (12, 13), (13, 13)])

    def test_the_clean_up_of_the_finished_text_is_left_out(self, bert):
        ids = ids_of(bert, "don", "'", "t")
        assert bert.decode(ids, skip_special_tokens=True) == "don't"
        assert mapped(bert, ids) == ("don ' t", [(0, 3), (3, 5), (5, 7)])

    def test_random_ids(self, bert):
        mapper = OffsetMapper(bert)
        rng = np.random.default_rng(0)
        for _ in range(300):
            ids = rng.integers(0, len(bert), size=6).tolist()
            text, offsets = mapper(ids)
            assert text == bert.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert set().union(*(range(a, b) for a, b in offsets)) == set(range(len(text)))


class TestOtherTokenizers:
    """Decoders that are not followed on bytes: every prefix is decoded, and what stays unclear is an error."""

    def test_an_unknown_decoder_is_traced_by_its_prefixes(self, bytes_only):
        """A step behind ByteLevel that is not known here; it changes no text, so the answers are those of above."""
        backend = Tokenizer.from_str(bytes_only.backend_tokenizer.to_str())
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex("~~~~"), "")])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
        ids = [*byte_tokens(tokenizer, "né😀!".encode()), tokenizer.eos_token_id]
        assert mapped(tokenizer, ids) == (
            "né😀!",
            [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (2, 3), (3, 4), (4, 4)],
        )

    def test_a_wrong_byte_is_traced_only_where_it_is_clear_whose_it_is(self, bytes_only):
        backend = Tokenizer.from_str(bytes_only.backend_tokenizer.to_str())
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex("~~~~"), "")])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
        cut = byte_tokens(tokenizer, b"a\xf0\x9f")
        assert mapped(tokenizer, cut) == ("a\ufffd", [(0, 1), (1, 2), (1, 2)])
        with pytest.raises(ValueError, match="cannot be traced"):
            OffsetMapper(tokenizer)(byte_tokens(tokenizer, b"\xf0\x9fa"))

    def test_characters_that_vanish_again_are_an_error(self, bytes_only):
        backend = Tokenizer.from_str(bytes_only.backend_tokenizer.to_str())
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex("ab"), "x")])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
        assert mapped(tokenizer, byte_tokens(tokenizer, b"ac")) == ("ac", [(0, 1), (1, 2)])
        with pytest.raises(ValueError, match=r"decodes id \d+ \(position 0 .*use a tokenizer with"):
            OffsetMapper(tokenizer)(byte_tokens(tokenizer, b"ab"))

    def test_a_python_tokenizer_that_hides_half_characters(self):
        """ByT5 drops incomplete bytes, so a prefix does not show to whom the character belongs."""
        tokenizer = ByT5Tokenizer()
        ascii_ids = tokenizer("ab", add_special_tokens=True)["input_ids"]
        assert mapped(tokenizer, ascii_ids) == ("ab", [(0, 1), (1, 2), (2, 2)])
        with pytest.raises(ValueError, match="ByT5Tokenizer decodes id"):
            OffsetMapper(tokenizer)(tokenizer("é", add_special_tokens=False)["input_ids"])

    def test_a_decode_of_its_own_is_noticed(self, bytes_only):
        class Shouting(PreTrainedTokenizerFast):
            def _decode(self, *args, **kwargs):
                return "<" + super()._decode(*args, **kwargs).upper() + ">"

        tokenizer = Shouting(tokenizer_object=bytes_only.backend_tokenizer, eos_token="<eos>")
        with pytest.raises(ValueError, match="Shouting"):
            OffsetMapper(tokenizer)(byte_tokens(tokenizer, b"ab"))
