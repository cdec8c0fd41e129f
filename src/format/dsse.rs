//! Signed statements: DSSE envelopes (<https://github.com/secure-systems-lab/dsse>, protocol 1.0) with ECDSA over P-256 and SHA-256,
//! and keys as PEM files.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use p256::ecdsa::signature::{Signer as _, Verifier as _};
use p256::ecdsa::{Signature, SigningKey, VerifyingKey};
use p256::pkcs8::{DecodePrivateKey as _, DecodePublicKey as _, EncodePublicKey as _, LineEnding};
use serde::{Deserialize, Serialize};

use crate::base::digest::Digest;

/// The payload type of in-toto statements.
pub const IN_TOTO: &str = "application/vnd.in-toto+json";

/// A payload with signatures over it and its type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Envelope {
    /// The payload, in base64.
    pub payload: String,
    /// What it is: a media type.
    pub payload_type: String,
    /// The signatures.
    pub signatures: Vec<Signed>,
}

/// A signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// The signature as DER, in base64.
    pub sig: String,
    /// A hint at the key; empty when there is none.
    #[serde(default)]
    pub keyid: String,
}

/// Why an envelope or a key is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it")]
pub enum DsseError {
    #[error(
        "not a P-256 private key as PEM (`openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one)"
    )]
    PrivateKey,
    #[error(
        "not a P-256 public key as PEM (`openssl ec -in key.pem -pubout -out key.pub.pem` writes that of a private one)"
    )]
    PublicKey,
    #[error("the payload is not base64")]
    Payload,
    #[error("no signature is valid for this key")]
    Signature,
}

/// A key that signs.
#[derive(Debug)]
pub struct PrivateKey(SigningKey);

impl PrivateKey {
    /// Reads PKCS #8 (`PRIVATE KEY`) or SEC 1 (`EC PRIVATE KEY`).
    ///
    /// # Errors
    /// [`DsseError::PrivateKey`].
    pub fn from_pem(pem: &str) -> Result<Self, DsseError> {
        let key = SigningKey::from_pkcs8_pem(pem).ok();
        let sec1 = || p256::SecretKey::from_sec1_pem(pem).ok().map(SigningKey::from);
        key.or_else(sec1).map(Self).ok_or(DsseError::PrivateKey)
    }

    /// The key that checks its signatures.
    pub fn public(&self) -> PublicKey {
        PublicKey(*self.0.verifying_key())
    }
}

/// A key that checks signatures.
#[derive(Debug)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// Reads a SubjectPublicKeyInfo (`PUBLIC KEY`).
    ///
    /// # Errors
    /// [`DsseError::PublicKey`].
    pub fn from_pem(pem: &str) -> Result<Self, DsseError> {
        VerifyingKey::from_public_key_pem(pem).map(Self).map_err(|_| DsseError::PublicKey)
    }

    /// The SHA-256 of the key as PEM, which names it.
    pub fn id(&self) -> String {
        let pem = self.0.to_public_key_pem(LineEnding::LF).unwrap_or_default();
        Digest::of(pem.as_bytes()).hex()
    }
}

impl Envelope {
    /// Signs a payload.
    pub fn sign(payload: &[u8], payload_type: &str, key: &PrivateKey) -> Self {
        let signature: Signature = key.0.sign(&encoded(payload_type, payload));
        let sig = STANDARD.encode(signature.to_der());
        let signatures = vec![Signed { sig, keyid: key.public().id() }];
        Self { payload: STANDARD.encode(payload), payload_type: payload_type.to_owned(), signatures }
    }

    /// The payload, when one of the signatures is valid for the key.
    ///
    /// # Errors
    /// When none is.
    pub fn open(&self, key: &PublicKey) -> Result<Vec<u8>, DsseError> {
        let payload = STANDARD.decode(&self.payload).map_err(|_| DsseError::Payload)?;
        let message = encoded(&self.payload_type, &payload);
        let is_valid = |signed: &Signed| {
            let der = STANDARD.decode(&signed.sig).ok()?;
            let signature = Signature::from_der(&der).ok()?;
            key.0.verify(&message, &signature).ok()
        };
        if self.signatures.iter().any(|signed| is_valid(signed).is_some()) {
            Ok(payload)
        } else {
            Err(DsseError::Signature)
        }
    }
}

/// The pre-authentication encoding: what is signed.
fn encoded(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    bytes.extend(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A key for tests alone, made with openssl.
    const KEY: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgI1ObEaMR3mtFhkys
jXEhWiPwtkh/NCsq/bC7XlF87M2hRANCAAT1egjxmZg6nLG99Y2VMS+fCy5p4G6f
qhXjj72yt0u4xSgJ1MnXDfMKFTSfq0D4CenvEvwNsI6KEGg5Cx8vA+aL
-----END PRIVATE KEY-----
";

    #[test]
    fn what_was_signed_opens_and_nothing_else() {
        let key = PrivateKey::from_pem(KEY).unwrap();
        let envelope = Envelope::sign(b"hello world", "http://example.com/HelloWorld", &key);
        assert_eq!(envelope.open(&key.public()).unwrap(), b"hello world");
        // The example of the protocol's page.
        let expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world";
        assert_eq!(encoded("http://example.com/HelloWorld", b"hello world"), expected);
        let other = Envelope { payload: STANDARD.encode("hello worle"), ..envelope.clone() };
        assert_eq!(other.open(&key.public()), Err(DsseError::Signature));
        let other = Envelope { payload_type: "text/plain".to_owned(), ..envelope.clone() };
        assert_eq!(other.open(&key.public()), Err(DsseError::Signature));
        let unsigned = Envelope { signatures: Vec::new(), ..envelope };
        assert_eq!(unsigned.open(&key.public()), Err(DsseError::Signature));
        assert_eq!(PrivateKey::from_pem("no key").unwrap_err(), DsseError::PrivateKey);
    }
}
