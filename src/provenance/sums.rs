//! `SHA256SUMS`: a line a file, as `sha256sum` writes and `sha256sum -c` checks it.
//!
//! A name with a backslash or a line break would need escapes that readers treat differently: it is
//! refused.

use std::collections::HashSet;
use std::path::Path;
use std::str::FromStr as _;

use super::{Error, Resource, SIGNATURE, SUMS};
use crate::files::Sha256;

/// The file's text.
///
/// # Errors
/// A name that the format cannot hold.
pub fn encode(folder: &Path, resources: &[Resource]) -> Result<String, Error> {
    let mut text = String::new();
    for Resource { name, sha256 } in resources {
        if name.contains(['\\', '\n', '\r']) {
            return Err(Error::Format {
                path: folder.join(name),
                expected: format!("a name that {SUMS} can hold"),
                found: format!("{name:?}"),
            });
        }
        text += &format!("{sha256}  {name}\n");
    }
    Ok(text)
}

/// The files that the text names.
///
/// # Errors
/// A line that is none of a digest, two characters and a name; a name twice.
pub fn decode(path: &Path, text: &str) -> Result<Vec<Resource>, Error> {
    let mut resources = Vec::new();
    let mut names = HashSet::new();
    for (number, line) in text.lines().enumerate() {
        let resource = line.split_once(' ').and_then(|(digest, name)| {
            Some(Resource {
                name: name.strip_prefix([' ', '*'])?.to_owned(),
                sha256: Sha256::from_str(digest).ok()?,
            })
        });
        let wrong = |found: &str| Error::Format {
            path: path.to_owned(),
            expected: format!("a sha256, two spaces and a name in line {}", number + 1),
            found: found.chars().take(80).collect(),
        };
        let resource = resource.ok_or_else(|| wrong(line))?;
        if !names.insert(resource.name.clone()) {
            return Err(wrong(&format!("'{}' once more", resource.name)));
        }
        resources.push(resource);
    }
    Ok(resources)
}

/// Whether a file is vouched for by the sums: all but the sums and the signature themselves.
pub fn covers(name: &str) -> bool {
    name != SUMS && name != SIGNATURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded_and_nonsense_is_refused() {
        let resource = |name: &str| Resource {
            name: name.into(),
            sha256: Sha256::of_bytes(name.as_bytes()),
        };
        let resources = vec![resource("config.json"), resource("onnx/a b.onnx")];
        let text = encode(Path::new("folder"), &resources).unwrap();
        assert_eq!(decode(Path::new(SUMS), &text).unwrap(), resources);
        for broken in ["abc  name", "", &text.replace("  ", " "), &text.repeat(2)] {
            let broken = format!("{broken}\n");
            assert!(decode(Path::new(SUMS), &broken).is_err(), "{broken}");
        }
        assert!(encode(Path::new("folder"), &[resource("two\nlines")]).is_err());
    }
}
