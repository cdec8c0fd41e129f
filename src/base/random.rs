//! Keys that nobody can guess.

use super::digest;

/// 24 random bytes in hexadecimal.
///
/// # Errors
/// When the system gives no random numbers.
pub fn key() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 24];
    getrandom::fill(&mut bytes)?;
    Ok(digest::hex(&bytes))
}
