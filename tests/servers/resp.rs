//! As much of RESP, Redis' protocol in its versions 2 and 3, as it takes to send a command and to tell frames apart.

/// A command as clients send it.
pub(super) fn encode(arguments: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", arguments.len()).into_bytes();
    for argument in arguments {
        bytes.extend(format!("${}\r\n{argument}\r\n", argument.len()).bytes());
    }
    bytes
}

/// What the first bytes of a buffer are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Frame {
    /// The beginning of a frame.
    Partial,
    /// A frame of that many bytes.
    Whole(usize),
    /// Not RESP, or an inline command.
    Foreign,
}

/// Looks at the first frame of `bytes`.
pub(super) fn frame(bytes: &[u8]) -> Frame {
    let Some(kind) = bytes.first() else { return Frame::Partial };
    if !b"+-:$*_#,(!=%~>|".contains(kind) {
        return Frame::Foreign;
    }
    let Some(line) = bytes.windows(2).position(|two| two == b"\r\n") else { return Frame::Partial };
    let number = std::str::from_utf8(&bytes[1..line]).ok().and_then(|text| text.parse::<i64>().ok());
    let mut end = line + 2;
    match (kind, number) {
        (b'$' | b'!' | b'=', Some(length)) => {
            if let Ok(length) = usize::try_from(length) {
                end += length + 2;
            }
            if end <= bytes.len() { Frame::Whole(end) } else { Frame::Partial }
        }
        (b'*' | b'~' | b'>' | b'%' | b'|', Some(count)) => {
            // Maps and attributes count pairs; an attribute is followed by what it belongs to.
            let parts = match kind {
                b'%' => count * 2,
                b'|' => count * 2 + 1,
                _ => count,
            };
            for _ in 0..parts {
                match frame(&bytes[end..]) {
                    Frame::Whole(length) => end += length,
                    other => return other,
                }
            }
            Frame::Whole(end)
        }
        (b'$' | b'!' | b'=' | b'*' | b'~' | b'>' | b'%' | b'|', None) => Frame::Foreign,
        _ => Frame::Whole(end),
    }
}

/// A whole frame for reading: a value as it is, an error with its `-`, nothing as `(nil)`, a list as lines.
pub(super) fn render(bytes: &[u8]) -> String {
    render_first(bytes).0
}

fn render_first(bytes: &[u8]) -> (String, usize) {
    let line = bytes.windows(2).position(|two| two == b"\r\n").expect("a whole frame");
    let text = String::from_utf8_lossy(&bytes[1..line]).into_owned();
    let mut end = line + 2;
    match bytes[0] {
        b'_' => ("(nil)".into(), end),
        b'$' | b'*' if text == "-1" => ("(nil)".into(), end),
        b'$' => {
            let length: usize = text.parse().expect("a whole frame");
            (String::from_utf8_lossy(&bytes[end..end + length]).into_owned(), end + length + 2)
        }
        b'*' => {
            let mut lines = Vec::new();
            for _ in 0..text.parse().expect("a whole frame") {
                let (line, length) = render_first(&bytes[end..]);
                lines.push(line);
                end += length;
            }
            (lines.join("\n"), end)
        }
        b'-' => (format!("-{text}"), end),
        _ => (text, end),
    }
}
