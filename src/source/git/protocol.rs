//! git's wire protocol, the fetching side, as much of it as bringing one commit needs: list refs, then ask for commits
//! while claiming to have nothing. Version 2, and version 0 for servers that know no better.
//!
//! Written after git's `Documentation/gitprotocol-v2.adoc`, `gitprotocol-pack.adoc` and `gitprotocol-common.adoc`.
//! Absent: negotiation, pushing, partial clones, SHA-256 repositories.

use std::io::{self, Read, Write};

use super::http::Http;
use super::pack::Guard;
use crate::source::SourceError;

/// The longest a packet may be: four digits of length and 65516 bytes.
const MAX_PACKET_BYTES: usize = 65520;
/// Far more than the largest repositories list.
const MAX_REFS: usize = 1_000_000;
/// Packets before the pack: shallow lines, acknowledgements.
const MAX_PREAMBLE: usize = 100_000;

/// A ref of the other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ref {
    pub name: String,
    /// 40 hexadecimal digits; of the commit, where an annotated tag is named.
    pub commit: String,
}

/// The two requests of the protocol, so that it can be tested without a network.
pub trait Channel {
    fn discover(&mut self) -> Result<Box<dyn Read>, SourceError>;
    fn call(&mut self, body: &[u8]) -> Result<Box<dyn Read>, SourceError>;
    /// An error of reading, told as what it is.
    fn broke(&self, error: &io::Error) -> SourceError;
    /// Something the other side must not do.
    fn refuse(&self, why: String) -> SourceError;
}

impl Channel for Http<'_> {
    fn discover(&mut self) -> Result<Box<dyn Read>, SourceError> {
        Http::discover(self)
    }
    fn call(&mut self, body: &[u8]) -> Result<Box<dyn Read>, SourceError> {
        Http::call(self, body)
    }
    fn broke(&self, error: &io::Error) -> SourceError {
        Http::broke(self, error)
    }
    fn refuse(&self, why: String) -> SourceError {
        self.network(why, None)
    }
}

/// Why there is no pack.
#[derive(Debug)]
pub enum FetchError {
    /// The server does not give these commits away, in its own words.
    Refused(String),
    /// The connection broke while the pack came.
    Broken(SourceError),
    Other(SourceError),
}

impl From<SourceError> for FetchError {
    fn from(error: SourceError) -> Self {
        Self::Other(error)
    }
}

/// A repository that has introduced itself.
#[derive(Debug)]
pub struct Remote<C> {
    channel: C,
    capabilities: Vec<String>,
    /// What a server of version 0 listed at once; `None` for version 2.
    listed: Option<Vec<Ref>>,
}

impl<C: Channel> Remote<C> {
    /// # Errors
    /// [`SourceError`] when there is no git server, or one that says no.
    pub fn connect(mut channel: C) -> Result<Self, SourceError> {
        let mut packets = Packets(channel.discover()?);
        let read = read_advertisement(&mut packets);
        let (capabilities, listed) = read.map_err(|trouble| trouble.tell(&channel))?;
        let format = capabilities.iter().find_map(|text| text.strip_prefix("object-format="));
        if let Some(format) = format.filter(|format| *format != "sha1") {
            return Err(
                channel.refuse(format!("its commits are named by {format}; only SHA-1 repositories can be read"))
            );
        }
        Ok(Self { channel, capabilities, listed })
    }

    /// The refs whose names begin with one of `prefixes`.
    ///
    /// # Errors
    /// [`SourceError`] when the server fails.
    pub fn refs(&mut self, prefixes: &[&str]) -> Result<Vec<Ref>, SourceError> {
        if let Some(listed) = &self.listed {
            let wanted = |found: &&Ref| prefixes.iter().any(|prefix| found.name.starts_with(prefix));
            return Ok(listed.iter().filter(wanted).cloned().collect());
        }
        let mut body = Vec::new();
        for line in ["command=ls-refs\n", AGENT] {
            packet(&mut body, line);
        }
        body.extend(b"0001");
        packet(&mut body, "peel\n");
        for prefix in prefixes {
            packet(&mut body, &format!("ref-prefix {prefix}\n"));
        }
        body.extend(b"0000");
        let mut packets = Packets(self.channel.call(&body)?);
        read_refs(&mut packets).map_err(|trouble| trouble.tell(&self.channel))
    }

    /// Whether asking for a commit that no ref names has a chance.
    fn gives_any(&self) -> bool {
        let any = ["allow-reachable-sha1-in-want", "allow-tip-sha1-in-want", "allow-any-sha1-in-want"];
        self.listed.is_none() || self.capabilities.iter().any(|text| any.contains(&text.as_str()))
    }

    /// Whether a refusal means that the commit is not there at all, so that looking for it in branches is of no use:
    /// servers of version 2, and those that allow it, give any commit that they have.
    pub fn is_final(&self, refusal: &str) -> bool {
        let reachable = ["allow-reachable-sha1-in-want", "allow-any-sha1-in-want"];
        let gives = self.listed.is_none() || self.capabilities.iter().any(|text| reachable.contains(&text.as_str()));
        gives && refusal.contains("not our ref")
    }

    fn can(&self, name: &str) -> bool {
        match &self.listed {
            Some(_) => self.capabilities.iter().any(|text| text == name),
            None => {
                let fetch = self.capabilities.iter().find_map(|text| text.strip_prefix("fetch="));
                fetch.is_some_and(|words| words.split(' ').any(|word| word == name))
            }
        }
    }

    /// Writes a pack with the commits to `sink`; with `shallow`, without their history where the server can leave it out.
    /// Gives the commits whose parents were left out.
    ///
    /// # Errors
    /// [`FetchError`]; the sink has then got a part of a pack at most.
    pub fn fetch(
        &mut self,
        commits: &[String],
        shallow: bool,
        sink: &mut Guard<'_>,
    ) -> Result<Vec<String>, FetchError> {
        let known = |commit: &String| self.listed.iter().flatten().any(|found| found.commit == *commit);
        if !self.gives_any() && !commits.iter().all(known) {
            return Err(FetchError::Refused("it gives only the commits that its branches and tags name".to_owned()));
        }
        let deepen = shallow && self.can("shallow");
        let body = if self.listed.is_some() { self.wants_v0(commits, deepen) } else { wants_v2(commits, deepen) };
        let mut packets = Packets(self.channel.call(&body)?);
        let read = match &self.listed {
            Some(_) => {
                let banded = self.can("side-band-64k");
                read_v0(&mut packets, deepen).and_then(|cut| read_pack(&mut packets, banded, sink).map(|()| cut))
            }
            None => read_v2(&mut packets).and_then(|cut| read_pack(&mut packets, true, sink).map(|()| cut)),
        };
        read.map_err(|trouble| match trouble {
            Trouble::Said(words) if sink.is_empty() => FetchError::Refused(words),
            Trouble::Read(error) => FetchError::Broken(self.channel.broke(&error)),
            other => FetchError::Other(other.tell(&self.channel)),
        })
    }

    fn wants_v0(&self, commits: &[String], deepen: bool) -> Vec<u8> {
        let mut body = Vec::new();
        let wished = ["ofs-delta", "side-band-64k", "no-progress", "shallow"];
        let mut chosen: String =
            wished.iter().filter(|name| self.can(name)).fold(String::new(), |text, name| format!("{text} {name}"));
        for commit in commits {
            packet(&mut body, &format!("want {commit}{}\n", std::mem::take(&mut chosen)));
        }
        if deepen {
            packet(&mut body, "deepen 1\n");
        }
        body.extend(b"0000");
        packet(&mut body, "done\n");
        body
    }
}

const AGENT: &str = concat!("agent=aitools/", env!("CARGO_PKG_VERSION"), "\n");

fn wants_v2(commits: &[String], deepen: bool) -> Vec<u8> {
    let mut body = Vec::new();
    for line in ["command=fetch\n", AGENT] {
        packet(&mut body, line);
    }
    body.extend(b"0001");
    for line in ["ofs-delta\n", "no-progress\n"] {
        packet(&mut body, line);
    }
    for commit in commits {
        packet(&mut body, &format!("want {commit}\n"));
    }
    if deepen {
        packet(&mut body, "deepen 1\n");
    }
    packet(&mut body, "done\n");
    body.extend(b"0000");
    body
}

fn packet(body: &mut Vec<u8>, line: &str) {
    body.extend(format!("{:04x}{line}", line.len() + 4).into_bytes());
}

/// What can go wrong in a conversation.
#[derive(Debug)]
enum Trouble {
    Read(io::Error),
    /// The server says no.
    Said(String),
    /// What it says makes no sense.
    Nonsense(&'static str),
    /// The pack is damaged or refused.
    Pack(SourceError),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

impl Trouble {
    fn tell(self, channel: &impl Channel) -> SourceError {
        match self {
            Self::Read(error) => channel.broke(&error),
            Self::Said(words) => channel.refuse(format!("the server says: {words}")),
            Self::Nonsense(why) => channel.refuse(format!("the server does not keep to git's protocol: {why}")),
            Self::Pack(error) => error,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Packet {
    Data(Vec<u8>),
    Flush,
    /// `0001` and `0002`: between sections, and at the end of a response.
    Delimiter,
}

struct Packets<R>(R);

impl<R: Read> Packets<R> {
    fn next(&mut self) -> Result<Packet, Trouble> {
        let mut digits = [0; 4];
        self.0.read_exact(&mut digits)?;
        let digits = std::str::from_utf8(&digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()));
        let length = digits.and_then(|text| usize::from_str_radix(text, 16).ok());
        match length.ok_or(Trouble::Nonsense("a packet has no length"))? {
            0 => Ok(Packet::Flush),
            1 | 2 => Ok(Packet::Delimiter),
            3 => Err(Trouble::Nonsense("a packet is too short")),
            length if length > MAX_PACKET_BYTES => Err(Trouble::Nonsense("a packet is too long")),
            length => {
                let mut data = vec![0; length - 4];
                self.0.read_exact(&mut data)?;
                match data.strip_prefix(b"ERR ") {
                    Some(words) => Err(Trouble::Said(printable(words))),
                    None => Ok(Packet::Data(data)),
                }
            }
        }
    }

    /// The next line of text, `None` at a flush.
    fn line(&mut self) -> Result<Option<String>, Trouble> {
        match self.next()? {
            Packet::Data(data) => {
                let text = String::from_utf8_lossy(&data);
                Ok(Some(text.strip_suffix('\n').unwrap_or(&text).to_owned()))
            }
            Packet::Flush => Ok(None),
            Packet::Delimiter => Err(Trouble::Nonsense("a section ends where none began")),
        }
    }
}

/// A server's words, fit for a terminal.
fn printable(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}

type Advertisement = (Vec<String>, Option<Vec<Ref>>);

fn read_advertisement(packets: &mut Packets<impl Read>) -> Result<Advertisement, Trouble> {
    let mut first = packets.line()?;
    if first.as_deref().is_some_and(|line| line.starts_with("# service=")) {
        if packets.next()? != Packet::Flush {
            return Err(Trouble::Nonsense("no flush after the service line"));
        }
        first = packets.line()?;
    }
    if first.as_deref() == Some("version 2") {
        let mut capabilities = Vec::new();
        while let Some(line) = packets.line()? {
            capabilities.push(line);
            if capabilities.len() > 1000 {
                return Err(Trouble::Nonsense("too many capabilities"));
            }
        }
        return Ok((capabilities, None));
    }
    if first.as_deref() == Some("version 1") {
        first = packets.line()?;
    }
    let (mut capabilities, mut refs) = (Vec::new(), Vec::new());
    let mut next = first;
    while let Some(line) = next {
        let (line, words) = line.split_once('\0').unwrap_or((&line, ""));
        if !words.is_empty() {
            capabilities = words.split(' ').map(str::to_owned).collect();
        }
        add_ref(line, &mut refs)?;
        next = packets.line()?;
    }
    Ok((capabilities, Some(refs)))
}

/// One line of version 0: an annotated tag is followed by a line for its commit, named with `^{}` at the end.
fn add_ref(line: &str, refs: &mut Vec<Ref>) -> Result<(), Trouble> {
    let (id, name) = line.split_once(' ').ok_or(Trouble::Nonsense("a ref has no name"))?;
    if id == "shallow" || name == "capabilities^{}" {
        return Ok(());
    }
    let commit = id.to_owned();
    if !is_commit(&commit) {
        return Err(Trouble::Nonsense("a ref has no commit"));
    }
    match name.strip_suffix("^{}") {
        Some(tag) => match refs.last_mut().filter(|last| last.name == tag) {
            Some(last) => last.commit = commit,
            None => return Err(Trouble::Nonsense("a tag's commit without a tag")),
        },
        None => refs.push(Ref { name: name.to_owned(), commit }),
    }
    if refs.len() > MAX_REFS { Err(Trouble::Nonsense("too many refs")) } else { Ok(()) }
}

/// 40 lowercase hexadecimal digits.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn read_refs(packets: &mut Packets<impl Read>) -> Result<Vec<Ref>, Trouble> {
    let mut refs = Vec::new();
    while let Some(line) = packets.line()? {
        let mut words = line.split(' ');
        let (id, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let commit = words.find_map(|word| word.strip_prefix("peeled:")).unwrap_or(id);
        if id == "unborn" {
            continue;
        }
        if !is_commit(commit) || name.is_empty() {
            return Err(Trouble::Nonsense("a ref has no commit or no name"));
        }
        refs.push(Ref { name: name.to_owned(), commit: commit.to_owned() });
        if refs.len() > MAX_REFS {
            return Err(Trouble::Nonsense("too many refs"));
        }
    }
    Ok(refs)
}

/// Version 2: sections, the last of which is the pack.
fn read_v2(packets: &mut Packets<impl Read>) -> Result<Vec<String>, Trouble> {
    let mut cut = Vec::new();
    for _ in 0..MAX_PREAMBLE {
        match packets.next()? {
            Packet::Data(line) if line.starts_with(b"packfile") => return Ok(cut),
            Packet::Data(line) => cut.extend(shallow_line(&line)),
            Packet::Delimiter => {}
            Packet::Flush => return Err(Trouble::Nonsense("an answer without a pack")),
        }
    }
    Err(Trouble::Nonsense("too much before the pack"))
}

fn shallow_line(line: &[u8]) -> Option<String> {
    let commit = std::str::from_utf8(line.strip_prefix(b"shallow ")?).ok()?.trim_end();
    is_commit(commit).then(|| commit.to_owned())
}

/// Version 0: shallow lines up to a flush when some were asked for, then `NAK`.
fn read_v0(packets: &mut Packets<impl Read>, deepen: bool) -> Result<Vec<String>, Trouble> {
    let (mut cut, mut deepen) = (Vec::new(), deepen);
    for _ in 0..MAX_PREAMBLE {
        match packets.next()? {
            Packet::Data(line) if line.starts_with(b"NAK") => return Ok(cut),
            Packet::Data(line) => cut.extend(shallow_line(&line)),
            Packet::Flush if deepen => deepen = false,
            Packet::Flush | Packet::Delimiter => return Err(Trouble::Nonsense("an answer without a pack")),
        }
    }
    Err(Trouble::Nonsense("too much before the pack"))
}

/// The pack itself: in bands (1 data, 2 progress, 3 a last error), or bare up to the end.
fn read_pack(packets: &mut Packets<impl Read>, banded: bool, sink: &mut Guard<'_>) -> Result<(), Trouble> {
    let mut bare = vec![0; 1 << 16];
    loop {
        if !banded {
            let count = packets.0.read(&mut bare)?;
            if count == 0 {
                return Ok(());
            }
            sink.write_all(&bare[..count]).map_err(|error| Trouble::Pack(sink.why(&error)))?;
            continue;
        }
        let Packet::Data(data) = packets.next()? else { return Ok(()) };
        match data.split_first() {
            Some((1, bytes)) => sink.write_all(bytes).map_err(|error| Trouble::Pack(sink.why(&error)))?,
            Some((2, _)) | None => {}
            Some((3, words)) => return Err(Trouble::Said(printable(words))),
            Some(_) => return Err(Trouble::Nonsense("an unknown band")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Task;

    /// Says what it was told to say, once each.
    #[derive(Debug)]
    struct Canned(Vec<Vec<u8>>);

    impl Channel for Canned {
        fn discover(&mut self) -> Result<Box<dyn Read>, SourceError> {
            self.call(b"")
        }
        fn call(&mut self, _: &[u8]) -> Result<Box<dyn Read>, SourceError> {
            Ok(Box::new(io::Cursor::new(self.0.remove(0))))
        }
        fn broke(&self, error: &io::Error) -> SourceError {
            self.refuse(format!("broke: {error}"))
        }
        fn refuse(&self, why: String) -> SourceError {
            SourceError::Network { what: String::new(), why, hint: None }
        }
    }

    fn lines(lines: &[&str]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for line in lines {
            match *line {
                "flush" => bytes.extend(b"0000"),
                "next" => bytes.extend(b"0001"),
                line => packet(&mut bytes, line),
            }
        }
        bytes
    }

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn connect(first: Vec<u8>, rest: &[Vec<u8>]) -> Result<Remote<Canned>, String> {
        let answers = std::iter::once(first).chain(rest.iter().cloned()).collect();
        Remote::connect(Canned(answers)).map_err(|error| error.to_string())
    }

    fn version_2() -> Vec<u8> {
        lines(&["# service=git-upload-pack\n", "flush", "version 2\n", "fetch=shallow wait-for-done\n", "flush"])
    }

    #[test]
    fn refs_of_both_versions() {
        let found = |name: &str, commit: &str| Ref { name: name.into(), commit: commit.into() };
        let old = lines(&[
            "version 1\n",
            &format!("{A} HEAD\0shallow side-band-64k\n"),
            &format!("{B} refs/tags/t\n"),
            &format!("{A} refs/tags/t^{{}}\n"),
            &format!("shallow {B}\n"),
            "flush",
        ]);
        let mut remote = connect(old, &[]).unwrap();
        assert_eq!(remote.refs(&["HEAD", "refs/tags/"]).unwrap(), [found("HEAD", A), found("refs/tags/t", A)]);
        let list = lines(&[
            &format!("{B} refs/tags/t symref-target:x peeled:{A}\n"),
            "unborn HEAD symref-target:refs/heads/main\n",
            "flush",
        ]);
        assert_eq!(connect(version_2(), &[list]).unwrap().refs(&["x"]).unwrap(), [found("refs/tags/t", A)]);
        let empty = lines(&[&format!("{} capabilities^{{}}\0shallow\n", "0".repeat(40)), "flush"]);
        assert_eq!(connect(empty, &[]).unwrap().refs(&[""]).unwrap(), []);
    }

    #[test]
    fn introductions_that_make_no_sense() {
        for (bytes, word) in [
            (b"".to_vec(), "broke"),
            (b"zzzz".to_vec(), "no length"),
            (b"+004".to_vec(), "no length"),
            (b"0003".to_vec(), "too short"),
            (b"fff9".to_vec(), "too long"),
            (b"0010abc".to_vec(), "broke"),
            (b"0001".to_vec(), "a section ends"),
            (lines(&["ERR no such\x1b[31m repo\n"]), "the server says: no such [31m repo"),
            (lines(&["# service=x", "version 2\n"]), "no flush"),
            (lines(&["nonsense", "flush"]), "no name"),
            (lines(&["short name", "flush"]), "no commit"),
            (lines(&[&format!("{A} t^{{}}"), "flush"]), "without a tag"),
            (lines(&["version 2\n", "object-format=sha256\n", "flush"]), "only SHA-1"),
            (lines(&[vec!["version 2\n"], vec!["x"; 1002]].concat()), "too many capabilities"),
        ] {
            let why = connect(bytes, &[]).unwrap_err();
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn answers_without_a_pack() {
        let folder = tempfile::tempdir().unwrap();
        let task = Task::silent();
        let fetch = |answer: Vec<u8>| {
            let mut sink = Guard::new(&task, "x", folder.path()).unwrap();
            let fetched = connect(version_2(), &[answer]).unwrap().fetch(&[A.to_owned()], true, &mut sink);
            format!("{:?}", fetched.unwrap_err())
        };
        for (answer, word) in [
            (lines(&["ERR upload-pack: not our ref\n"]), "Refused(\"upload-pack: not our ref\")"),
            (lines(&["packfile\n", "\x03out of memory"]), "Refused(\"out of memory\")"),
            (lines(&["packfile\n", "\x02working", "\x07?"]), "unknown band"),
            (lines(&["packfile\n", "\x02working"]), "Broken"),
            (lines(&["packfile\n", "\x01<html>not a pack"]), "Hostile"),
            (lines(&["shallow-info\n", &format!("shallow {A}\n"), "next", "flush"]), "without a pack"),
            (lines(&["acknowledgments\n"; MAX_PREAMBLE + 1]), "too much"),
        ] {
            let why = fetch(answer);
            assert!(why.contains(word), "{why}");
        }
        // A server of version 0 that gives only what it lists is not even asked for something else.
        let old = lines(&[&format!("{B} HEAD\0shallow\n"), "flush"]);
        let mut sink = Guard::new(&task, "x", folder.path()).unwrap();
        let refused = connect(old, &[]).unwrap().fetch(&[A.to_owned()], true, &mut sink);
        assert!(matches!(refused, Err(FetchError::Refused(_))));
    }
}
