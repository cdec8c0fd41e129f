//! Activation statistics: how often each neuron of a layer fired, as PowerInfer's models carry them
//! (`activation/activation_<layer>.pt`, one tensor of one dimension in PyTorch's zip format).
//!
//! Such a file contains a pickle, which is a program. It is never executed: the pickle is read as a flat
//! list of values, and only the list that `torch.save` writes for such a tensor is accepted.

use std::io::{Cursor, Read as _};
use std::path::Path;

use zip::{CompressionMethod, ZipArchive};

use crate::base::fs::{self, FsError};

/// The most bytes that a file may have in addition to its data.
const OVERHEAD_BYTES: u64 = 256 * 1024;
const PICKLE_LIMIT_BYTES: u64 = 16 * 1024;

/// Why activation statistics cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum ActivationError {
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("`{file}` is not usable as activation statistics: {why}")]
    Bad { file: String, why: String },
}

/// The statistics of every layer, in the order of the layers; `neurons` says how many each one has.
///
/// # Errors
/// When a file is missing, is anything but such a tensor, or there are more files than layers.
pub fn read_all(folder: &Path, neurons: &[usize]) -> Result<Vec<Vec<f64>>, ActivationError> {
    let name = |layer: usize| format!("activation_{layer}.pt");
    let surplus = name(neurons.len());
    if fs::exists(&folder.join(&surplus)) {
        let why = format!("the model has {} layers: the file belongs to another model", neurons.len());
        return Err(ActivationError::Bad { file: surplus, why });
    }
    let read = |(layer, count): (usize, &usize)| {
        let file = name(layer);
        let bytes = fs::read_bounded(&folder.join(&file), *count as u64 * 8 + OVERHEAD_BYTES)?;
        parse(&bytes, *count).map_err(|why| ActivationError::Bad { file, why })
    };
    neurons.iter().enumerate().map(read).collect()
}

/// One file's numbers.
fn parse(bytes: &[u8], neurons: usize) -> Result<Vec<f64>, String> {
    let mut archive =
        ZipArchive::new(Cursor::new(bytes)).map_err(|error| format!("not a file of `torch.save` ({error})"))?;
    let mut names = archive.file_names().filter_map(|name| name.ok().map(|name| name.into_owned()));
    let main = names.find(|name| name.ends_with("/data.pkl")).ok_or("it contains no `data.pkl`")?;
    drop(names);
    let folder = main.trim_end_matches("data.pkl");
    let tensor = Tensor::parse(&entry(&mut archive, &main, PICKLE_LIMIT_BYTES)?)?;
    if tensor.length != neurons {
        return Err(format!("it has {} numbers, but the layer has {neurons} neurons", tensor.length));
    }
    let order = format!("{folder}byteorder");
    if archive.index_for_name(&order).is_some() && entry(&mut archive, &order, 16)? != b"little" {
        return Err("its numbers are not in little-endian order".to_owned());
    }
    let data = entry(&mut archive, &format!("{folder}data/{}", tensor.key), bytes.len() as u64)?;
    let size = tensor.kind.size_bytes();
    let begin = tensor.offset.checked_mul(size).ok_or("its offset is too large")?;
    let numbers = begin.checked_add(neurons * size).and_then(|end| data.get(begin..end));
    let numbers = numbers.ok_or("it is cut short")?;
    let numbers: Vec<f64> = numbers.chunks_exact(size).map(|number| tensor.kind.decode(number)).collect();
    if numbers.iter().all(|number| number.is_finite()) { Ok(numbers) } else { Err("a number is not finite".to_owned()) }
}

/// A stored (not compressed) file of the archive.
fn entry(archive: &mut ZipArchive<Cursor<&[u8]>>, name: &str, limit_bytes: u64) -> Result<Vec<u8>, String> {
    let file = archive.by_name(name).map_err(|error| format!("`{name}` cannot be read ({error})"))?;
    if file.compression() != CompressionMethod::Stored {
        return Err(format!("`{name}` is compressed"));
    }
    let mut bytes = Vec::new();
    let read = file.take(limit_bytes + 1).read_to_end(&mut bytes);
    read.map_err(|error| format!("`{name}` cannot be read ({error})"))?;
    if bytes.len() as u64 > limit_bytes { Err(format!("`{name}` is too large")) } else { Ok(bytes) }
}

/// The number types that are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Half,
    Float,
    Double,
    Int,
    Long,
}

impl Kind {
    fn of_storage(class: &str) -> Option<Self> {
        match class {
            "torch HalfStorage" => Some(Self::Half),
            "torch FloatStorage" => Some(Self::Float),
            "torch DoubleStorage" => Some(Self::Double),
            "torch IntStorage" => Some(Self::Int),
            "torch LongStorage" => Some(Self::Long),
            _ => None,
        }
    }

    fn size_bytes(self) -> usize {
        match self {
            Self::Half => 2,
            Self::Float | Self::Int => 4,
            Self::Double | Self::Long => 8,
        }
    }

    /// `bytes` are [`Kind::size_bytes`] many.
    fn decode(self, bytes: &[u8]) -> f64 {
        let bits = bytes.iter().rev().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
        match self {
            Self::Half => half(bits as u16),
            Self::Float => f64::from(f32::from_bits(bits as u32)),
            Self::Double => f64::from_bits(bits),
            Self::Int => f64::from(bits as u32 as i32),
            Self::Long => bits as i64 as f64,
        }
    }
}

/// IEEE 754 binary16.
fn half(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let size = match exponent {
        0 => fraction * f64::from(-24).exp2(),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + fraction) * f64::from(exponent - 25).exp2(),
    };
    if bits >> 15 == 1 { -size } else { size }
}

/// Where a tensor's data is.
#[derive(Debug, PartialEq, Eq)]
struct Tensor {
    kind: Kind,
    /// The name of the file with its numbers.
    key: String,
    /// In numbers.
    offset: usize,
    length: usize,
}

/// One pickle value, of the kinds that such a tensor needs.
#[derive(Debug, PartialEq, Eq)]
enum Word {
    Mark,
    Tuple,
    Tuple1,
    EmptyTuple,
    PersistentId,
    Reduce,
    Bool,
    Stop,
    /// `module name`.
    Global(String),
    Text(String),
    Int(i64),
}

impl Tensor {
    /// What `torch.save` writes (`torch/_utils.py`, `_rebuild_tensor_v2`: storage, offset, size, stride, requires_grad,
    /// backward hooks), as values; nothing else is accepted.
    fn parse(pickle: &[u8]) -> Result<Self, String> {
        use Word::{Bool, EmptyTuple, Global, Int, Mark, PersistentId, Reduce, Stop, Text, Tuple, Tuple1};
        let words = words(pickle)?;
        let [
            Global(rebuild),
            Mark,
            Mark,
            Text(what),
            Global(class),
            Text(key),
            Text(_),
            Int(_),
            Tuple,
            PersistentId,
            Int(offset),
            Int(length),
            Tuple1,
            Int(1),
            Tuple1,
            Bool,
            Global(hooks),
            EmptyTuple,
            Reduce,
            Tuple,
            Reduce,
            Stop,
        ] = words.as_slice()
        else {
            return Err("it does not contain exactly one one-dimensional tensor".to_owned());
        };
        if (rebuild.as_str(), what.as_str(), hooks.as_str())
            != ("torch._utils _rebuild_tensor_v2", "storage", "collections OrderedDict")
        {
            return Err(format!("it calls `{rebuild}` with `{what}` and `{hooks}`, which a saved tensor does not do"));
        }
        let kind = Kind::of_storage(class).ok_or_else(|| format!("its numbers are a `{class}`"))?;
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(format!("`{key}` is not a valid name of its data"));
        }
        let whole = |number: &i64| usize::try_from(*number).map_err(|_| format!("{number} is not a size"));
        Ok(Self { kind, key: key.clone(), offset: whole(offset)?, length: whole(length)? })
    }
}

/// The values of a pickle of protocol 2 (Python's `pickletools`). Memo opcodes are skipped:
/// no accepted pickle reads the memo.
fn words(mut pickle: &[u8]) -> Result<Vec<Word>, String> {
    const MOST: usize = 64;
    let cut = || "its pickle is cut short".to_owned();
    let mut words = Vec::new();
    while words.len() <= MOST {
        let opcode = *pickle.split_off_first().ok_or_else(cut)?;
        let mut take = |count: usize| pickle.split_off(..count).ok_or_else(cut);
        words.push(match opcode {
            // PROTO, BINPUT, LONG_BINPUT
            0x80 | b'q' => {
                take(1)?;
                continue;
            }
            b'r' => {
                take(4)?;
                continue;
            }
            b'(' => Word::Mark,
            b't' => Word::Tuple,
            0x85 => Word::Tuple1,
            b')' => Word::EmptyTuple,
            b'Q' => Word::PersistentId,
            b'R' => Word::Reduce,
            0x88 | 0x89 => Word::Bool,
            b'.' => Word::Stop,
            b'K' => Word::Int(little(take(1)?)),
            b'M' => Word::Int(little(take(2)?)),
            b'J' => Word::Int(i64::from(little(take(4)?) as i32)),
            b'X' => {
                let length = usize::try_from(little(take(4)?)).map_err(|_| cut())?;
                Word::Text(String::from_utf8_lossy(take(length)?).into_owned())
            }
            b'c' => Word::Global(format!("{} {}", line(&mut pickle)?, line(&mut pickle)?)),
            other => return Err(format!("its pickle has the opcode {other:#04x}, which such a tensor does not need")),
        });
        if words.last() == Some(&Word::Stop) {
            return Ok(words);
        }
    }
    Err(format!("its pickle has more than {MOST} words"))
}

/// At most 4 bytes.
fn little(bytes: &[u8]) -> i64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | i64::from(*byte))
}

fn line(pickle: &mut &[u8]) -> Result<String, String> {
    let end = pickle.iter().take(200).position(|byte| *byte == b'\n').ok_or("a name in its pickle has no end")?;
    let text = String::from_utf8_lossy(&pickle[..end]).into_owned();
    *pickle = &pickle[end + 1..];
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::powerinfer::tiny::{torch_archive, torch_file, torch_pickle};

    fn floats(numbers: &[f32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    #[test]
    fn every_type_of_number() {
        let (wanted, halves) = ([0.0, 1.5, -2.0], [0x0000u16, 0x3e00, 0xc000]);
        let table: [(&str, Vec<u8>, &[f64]); 5] = [
            ("FloatStorage", floats(&[0.0, 1.5, -2.0]), &wanted),
            ("DoubleStorage", wanted.iter().flat_map(|number| number.to_le_bytes()).collect(), &wanted),
            ("HalfStorage", halves.iter().flat_map(|number| number.to_le_bytes()).collect(), &wanted),
            ("IntStorage", [0i32, 7, -2].iter().flat_map(|number| number.to_le_bytes()).collect(), &[0.0, 7.0, -2.0]),
            ("LongStorage", [0i64, 7, -2].iter().flat_map(|number| number.to_le_bytes()).collect(), &[0.0, 7.0, -2.0]),
        ];
        for (class, bytes, expected) in table {
            assert_eq!(parse(&torch_file(class, 3, &bytes), 3).as_deref(), Ok(expected), "{class}");
        }
        assert_eq!(half(0x0001), 2f64.powi(-24));
        assert_eq!(half(0x7bff), 65504.0);
    }

    #[test]
    fn anything_else_is_refused() {
        let good = torch_file("FloatStorage", 2, &floats(&[1.0, 2.0]));
        assert!(parse(&good, 2).is_ok());
        let with = |from: &[u8], to: &[u8]| {
            let pickle = torch_pickle("FloatStorage", 2);
            let at = pickle.windows(from.len()).position(|part| part == from).unwrap();
            let pickle = [&pickle[..at], to, &pickle[at + from.len()..]].concat();
            parse(&torch_archive(&pickle, &floats(&[1.0, 2.0])), 2)
        };
        let global = b"cos\nsystem\n".as_slice();
        let table: [(&str, Result<Vec<f64>, String>); 16] = [
            ("not a file of", parse(b"", 2)),
            ("not a file of", parse(b"\x80\x02cos\nsystem\n", 2)),
            ("has 2 numbers", parse(&good, 3)),
            ("cut short", parse(&torch_file("FloatStorage", 2, &[0; 7]), 2)),
            ("not finite", parse(&torch_file("FloatStorage", 2, &floats(&[1.0, f32::NAN])), 2)),
            ("`torch BoolStorage`", parse(&torch_file("BoolStorage", 2, &[0; 8]), 2)),
            ("exactly one", with(b"\x85q\x06K\x01", b"\x85q\x06K\x02")),
            ("exactly one", with(b"c", &[global, b"c"].concat())),
            ("`os system`", with(b"ctorch._utils\n_rebuild_tensor_v2\n", global)),
            ("`os system`", with(b"ccollections\nOrderedDict\n", global)),
            ("opcode", with(b"Q", b"o")),
            ("not a size", with(b"K\x00", b"J\xff\xff\xff\xff")),
            ("cut short", with(b"\x07\x00\x00\x00storage", b"\xff\xff\xff\xffstorage")),
            ("has no end", with(b"_rebuild_tensor_v2\n", &[b'a'; 500])),
            ("not a size", with(b"J\x02\x00\x00\x00\x85", b"J\xfe\xff\xff\xff\x85")),
            ("not a valid name", with(b"\x01\x00\x00\x000", b"\x02\x00\x00\x00..")),
        ];
        for (why, result) in table {
            let error = result.unwrap_err();
            assert!(error.contains(why), "{why}: {error}");
        }
        let endless = [torch_pickle("FloatStorage", 2)[..2].to_vec(), vec![b'('; 5000]].concat();
        assert!(parse(&torch_archive(&endless, &[]), 2).unwrap_err().contains("more than 64 words"));
    }

    #[test]
    fn every_cut_and_changed_byte_is_survived() {
        let good = torch_file("FloatStorage", 2, &floats(&[1.0, 2.0]));
        for at in 0..good.len() {
            assert!(parse(&good[..at], 2).is_err(), "cut at {at}");
            let mut changed = good.clone();
            changed[at] ^= 0xff;
            let _ = parse(&changed, 2);
        }
    }

    #[test]
    fn layers_are_in_the_order_of_their_numbers() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("activation é");
        let write = |layer: usize| {
            let bytes = torch_file("FloatStorage", 1, &floats(&[layer as f32]));
            fs::write_atomic(&folder.join(format!("activation_{layer}.pt")), &bytes).unwrap();
        };
        (0..12).for_each(write);
        let all = read_all(&folder, &[1; 12]).unwrap();
        assert_eq!(all.concat(), (0..12).map(f64::from).collect::<Vec<_>>());
        assert!(matches!(read_all(&folder, &[1; 13]), Err(ActivationError::Fs(_))), "one is missing");
        assert!(read_all(&folder, &[1; 11]).unwrap_err().to_string().contains("11 layers"), "one too many");
        assert!(read_all(&folder, &[2; 12]).unwrap_err().to_string().contains("activation_0.pt"));
    }
}
