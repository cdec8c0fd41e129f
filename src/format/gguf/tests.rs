//! Headers made byte by byte: good ones, each way to be wrong, and every byte changed. Absent: real models.

use super::{GgufError, Header, Magic, Split, TENSOR_TYPES, Tensor, TokenKind, Value};
use crate::format::gguf::PartName;

/// Builds a file's bytes, as GGUF lays them out.
#[derive(Debug, Clone)]
struct Build {
    magic: [u8; 4],
    version: u32,
    entries: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn array(kind: u32, length: u64, items: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &length.to_le_bytes(), items].concat()
}

fn tensor(name: &str, shape: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let shape_bytes: Vec<u8> = shape.iter().flat_map(|size| size.to_le_bytes()).collect();
    [&text(name)[..], &(shape.len() as u32).to_le_bytes(), &shape_bytes, &kind.to_le_bytes(), &offset.to_le_bytes()]
        .concat()
}

impl Build {
    fn new() -> Self {
        Self { magic: *b"GGUF", version: 3, entries: Vec::new(), tensors: Vec::new() }
    }

    fn with(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.entries.push([&text(key)[..], &kind.to_le_bytes(), value].concat());
        self
    }

    fn tensor(mut self, name: &str, shape: &[u64], kind: u32, offset: u64) -> Self {
        self.tensors.push(tensor(name, shape, kind, offset));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let counts = [(self.tensors.len() as u64).to_le_bytes(), (self.entries.len() as u64).to_le_bytes()].concat();
        [&self.magic[..], &self.version.to_le_bytes(), &counts, &self.entries.concat(), &self.tensors.concat()].concat()
    }

    fn refused(&self) -> String {
        Header::parse(&self.bytes(), None).expect_err("must be refused").to_string()
    }
}

/// A small model with a value of every type.
fn sample() -> Build {
    let tokens: Vec<u8> = ["<s>", "é", ""].iter().flat_map(|token| text(token)).collect();
    let nested = [array(4, 1, &[1, 0, 0, 0]), array(8, 1, &text("x"))].concat();
    Build::new()
        .with("general.architecture", 8, &text("llama"))
        .with("general.name", 8, &text("Tiny é"))
        .with("general.alignment", 4, &64u32.to_le_bytes())
        .with("llama.context_length", 4, &2048u32.to_le_bytes())
        .with("llama.block_count", 5, &2i32.to_le_bytes())
        .with("llama.embedding_length", 10, &256u64.to_le_bytes())
        .with("llama.feed_forward_length", 2, &512u16.to_le_bytes())
        .with("llama.rope.freq_base", 6, &1e4f32.to_le_bytes())
        .with("a.f64", 12, &0.5f64.to_le_bytes())
        .with("a.u8", 0, &[200])
        .with("a.i8", 1, &[200])
        .with("a.i16", 3, &(-2i16).to_le_bytes())
        .with("a.i64", 11, &(-3i64).to_le_bytes())
        .with("a.bool", 7, &[1])
        .with("a.nested", 9, &array(9, 2, &nested))
        .with("tokenizer.ggml.tokens", 9, &array(8, 3, &tokens))
        .with("tokenizer.ggml.scores", 9, &array(6, 3, &[0; 12]))
        .with("tokenizer.chat_template", 8, &text("{{ messages }}"))
        .with("split.no", 2, &1u16.to_le_bytes())
        .with("split.count", 2, &3u16.to_le_bytes())
        .with("split.tensors.count", 5, &7i32.to_le_bytes())
        .tensor("token_embd.weight", &[256, 3], 12, 0)
        .tensor("output_norm.weight", &[256], 0, 448)
        .tensor("new.weight", &[7, 7], 99, 1472)
}

#[test]
fn a_small_model() {
    let bytes = sample().bytes();
    let header = Header::parse(&bytes, None).expect("good");
    assert_eq!((header.magic, header.version), (Magic::Gguf, 3));
    assert_eq!(header.architecture(), Some("llama"));
    assert_eq!(header.name(), Some("Tiny é"));
    assert_eq!((header.context_length(), header.block_count()), (Some(2048), Some(2)));
    assert_eq!((header.embedding_length(), header.feed_forward_length()), (Some(256), Some(512)));
    assert_eq!(header.chat_template(), Some("{{ messages }}"));
    assert_eq!((header.vocabulary_size(), header.array_length("a.nested")), (Some(3), Some(2)));
    assert_eq!(header.split(), Some(Split { number: 1, count: 3, tensors: Some(7) }));
    for (key, value) in [
        ("a.u8", Value::Uint(200)),
        ("a.i8", Value::Int(-56)),
        ("a.i16", Value::Int(-2)),
        ("a.i64", Value::Int(-3)),
        ("a.bool", Value::Bool(true)),
    ] {
        assert_eq!(header.metadata.get(key), Some(&value), "{key}");
    }
    assert_eq!(header.uint("a.i64"), None);
    let norm =
        Tensor { name: "output_norm.weight".to_owned(), shape: vec![256], kind: 0, offset: 448, size_bytes: 1024 };
    assert_eq!(header.tensors[1], norm);
    assert_eq!(header.tensors[0].size_bytes, 3 * 144);
    assert_eq!((header.tensors[2].tensor_type(), header.tensors[2].size_bytes), (None, 0));
    let types: Vec<(String, u64)> = header.types().into_iter().map(|share| (share.name, share.size_bytes)).collect();
    assert_eq!(types, [("F32".to_owned(), 1024), ("Q4_K".to_owned(), 432), ("type 99".to_owned(), 0)]);
    assert_eq!(header.data_offset, (bytes.len() as u64).next_multiple_of(64));
}

#[test]
fn special_tokens_are_kept() {
    let long = "x".repeat(300);
    let tokens = ["<unk>", "<s>", "a", "<|é|>", &long, "", "<|im_end|>"];
    let texts: Vec<u8> = tokens.iter().flat_map(|token| text(token)).collect();
    let types: Vec<u8> = [2i32, 3, 1, 4, 3, 3, 1].iter().flat_map(|kind| kind.to_le_bytes()).collect();
    let with = |types: &[u8], count| {
        let build = Build::new().with("tokenizer.ggml.tokens", 9, &array(8, 7, &texts));
        Header::parse(&build.with("tokenizer.ggml.token_type", 9, &array(5, count, types)).bytes(), None)
    };
    let header = with(&types, 7).expect("good");
    assert_eq!(
        header.special_tokens,
        std::collections::BTreeMap::from([("<s>".to_owned(), 1), ("<|é|>".to_owned(), 3)])
    );
    let markers = [
        ("<s>", TokenKind::Control),
        ("<unk>", TokenKind::Unknown),
        ("<|im_end|>", TokenKind::Normal),
        ("<|é|>", TokenKind::UserDefined),
    ];
    assert_eq!(header.markers, markers.map(|(text, kind)| (text.to_owned(), kind)).into());
    assert_eq!(header.vocabulary_size(), Some(7));
    assert_eq!(with(&types[..8], 2).expect("good").special_tokens.len(), 1, "fewer types than tokens");
    assert!(with(&types, u64::MAX / 8).is_err());
}

#[test]
fn powerinfer_files_have_another_magic_and_older_numbers() {
    let mut build = sample().tensor("blk.0.gpu_idx", &[5], 18, 1472);
    build.magic = *b"PWRI";
    build.version = 2;
    let header = Header::parse(&build.bytes(), None).expect("good");
    assert_eq!((header.magic, header.version), (Magic::Pwri, 2));
    let index = header.tensors.last().expect("a tensor");
    assert_eq!((index.tensor_type().map(|known| known.name), index.size_bytes), (Some("I32"), 20));
}

#[test]
fn a_file_that_is_cut_off_names_the_tensor() {
    let header = Header::parse(&sample().bytes(), None).expect("good");
    let whole = header.data_offset + 448 + 1024;
    assert_eq!(header.whole_size(), whole);
    assert!(header.check_extents(whole).is_ok());
    let error = header.check_extents(whole - 10).expect_err("cut off").to_string();
    assert_eq!(
        error,
        format!("the file is cut off: 10 of {whole} bytes are missing, tensor `output_norm.weight` is not whole")
    );
}

#[test]
fn a_prefix_asks_for_more() {
    let bytes = sample().bytes();
    for length in 0..bytes.len() {
        let error = Header::parse(&bytes[..length], None).expect_err("cut off");
        assert!(matches!(error, GgufError::Ended(_)), "{length}: {error}");
        let error = Header::parse(&bytes, Some(length as u64)).expect_err("cut off");
        assert!(matches!(error, GgufError::Ended(_)), "{length}: {error}");
    }
    assert!(Header::parse(&[&bytes[..], &[7; 100]].concat(), Some(bytes.len() as u64 + 100)).is_ok());
}

#[test]
fn other_files_are_named() {
    let said = |begins: &[u8]| Header::parse(begins, None).expect_err("refused").to_string();
    assert!(said(b"version https://git-lfs.github.com/spec/v1\n").contains("LFS pointer"));
    assert!(said(b"<!DOCTYPE html>").contains("web page"));
    assert!(said(b"\x00\x1b[31m").contains("`\\x00\\x1b[3`"));
    assert!(said(b"GGUF\x01\0\0\0").contains("version 1"));
    assert!(said(b"GGUF\x04\0\0\0").contains("version 4"));
    assert!(said(b"GGUF\0\0\0\x03").contains("big-endian"));
}

#[test]
fn each_way_to_be_wrong() {
    let alignment = |number: u32| Build::new().with("general.alignment", 4, &number.to_le_bytes()).refused();
    assert!(
        alignment(0).contains("power of two")
            && alignment(48).contains("power of two")
            && alignment(1 << 31).contains("power of two")
    );
    let one = |shape: &[u64], kind, offset| Build::new().tensor("t", shape, kind, offset).refused();
    assert!(one(&[], 0, 0).contains("0 dimensions"));
    assert!(one(&[1; 5], 0, 0).contains("5 dimensions"));
    assert!(one(&[4, 0], 0, 0).contains("impossible"));
    assert!(one(&[1 << 40, 1 << 40], 0, 0).contains("impossible"));
    assert!(one(&[1 << 62], 0, 0).contains("beyond"));
    assert!(one(&[4], 0, u64::MAX - 31).contains("beyond"));
    assert!(one(&[4], 0, 31).contains("alignment 32"));
    assert!(one(&[33], 2, 0).contains("rows of 33 elements cannot be stored as Q4_0 in blocks of 32"));
    assert!(Build::new().tensor("t", &[1], 0, 0).tensor("t", &[1], 0, 32).refused().contains("given twice"));
    assert!(Build::new().with("k", 7, &[1]).with("k", 7, &[1]).refused().contains("given twice"));
    assert!(Build::new().with("k", 7, &[2]).refused().contains("neither"));
    assert!(Build::new().with("k", 13, &[]).refused().contains("not a value type"));
    assert!(Build::new().with("k\u{1b}\n", 13, &[]).refused().contains("k\\u{1b}\\n"));
    assert!(Build::new().with("k", 9, &array(13, 0, &[])).refused().contains("not a value type"));
    assert!(Build::new().with("k", 8, &[2, 0, 0, 0, 0, 0, 0, 0, 0xc3, 0x28]).refused().contains("UTF-8"));
    let deep = (0..5).fold(array(0, 0, &[]), |inner, _| array(9, 1, &inner));
    assert!(Build::new().with("k", 9, &deep).refused().contains("nested"));
}

#[test]
fn huge_numbers_cost_nothing() {
    let counts = |tensors: u64, entries: u64| {
        let bytes = [&b"GGUF\x03\0\0\0"[..], &tensors.to_le_bytes(), &entries.to_le_bytes()].concat();
        Header::parse(&bytes, None).expect_err("refused")
    };
    for (tensors, entries) in [(u64::MAX, 0), (0, u64::MAX), (1 << 20, 0)] {
        assert!(matches!(counts(tensors, entries), GgufError::Limit { .. }));
    }
    assert!(matches!(counts(1000, 1000), GgufError::Ended(_)));
    for kind in [0, 8, 9, 12] {
        let error =
            Header::parse(&Build::new().with("k", 9, &array(kind, u64::MAX, &[])).bytes(), None).expect_err("refused");
        assert!(matches!(error, GgufError::Limit { .. } | GgufError::Ended(_)), "{error}");
    }
    let long = Build::new().with("k", 8, &(1u64 << 40).to_le_bytes()).bytes();
    assert!(matches!(Header::parse(&long, None), Err(GgufError::Limit { .. })));
}

/// What has no end: a header must still come to one.
#[test]
fn endless_files_end() {
    for (kind, length) in [(0, u64::MAX), (8, 1 << 20), (8, u64::MAX), (9, 1 << 20)] {
        let list = array(kind, length, &[]);
        let entry = [&text("k")[..], &9u32.to_le_bytes(), &list].concat();
        let head = [&b"GGUF\x03\0\0\0"[..], &[0; 8], &1000u64.to_le_bytes(), &entry].concat();
        let error = Header::read(std::io::Read::chain(&head[..], std::io::repeat(0)), None).expect_err("endless");
        assert!(!matches!(error, GgufError::Ended(_)), "{error}");
    }
}

#[test]
fn no_changed_byte_panics() {
    let bytes = sample().bytes();
    for at in 0..bytes.len() {
        for change in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[at] ^= change;
            if let Ok(header) = Header::parse(&changed, None) {
                let _ = (header.check_extents(10), header.types(), header.split());
            }
        }
    }
    // A fixed sequence of noise (splitmix64), after a good beginning and alone.
    let mut state = 7u64;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    };
    for round in 0..3000 {
        let mut noisy = bytes[..if round % 2 == 0 { 24 } else { 4 }].to_vec();
        let length = next() % 400;
        noisy.extend((0..length).map(|_| if next() % 3 == 0 { (next() % 16) as u8 } else { next() as u8 }));
        let _ = Header::parse(&noisy, None);
        let mut scattered = bytes.clone();
        for _ in 0..4 {
            let at = next() as usize % scattered.len();
            scattered[at] = next() as u8;
        }
        let _ = Header::parse(&scattered, Some(next() % 4096));
    }
}

#[test]
fn the_table_of_types_has_each_once() {
    for pair in TENSOR_TYPES.windows(2) {
        assert!(pair[0].kind < pair[1].kind && pair[0].name != pair[1].name);
    }
}

#[test]
fn names_of_parts() {
    let part = PartName::of("d/a-b-00002-of-00003.gguf").expect("a part");
    assert_eq!((part.stem, part.number, part.count), ("d/a-b", 2, 3));
    assert_eq!(part.to_string(), "d/a-b-00002-of-00003.gguf");
    for path in ["a.gguf", "a-1-of-3.gguf", "a-00001-of-00003.bin", "a-00001-of-0000x.gguf", "a-+0001-of-00003.gguf"] {
        assert_eq!(PartName::of(path), None, "{path}");
    }
}
