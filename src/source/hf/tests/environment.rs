//! What the environment and the machine bring along: variables, certificates, lock files of others.

use super::*;

#[test]
fn the_environment_means_what_it_means_to_the_python_client() {
    let root = tempfile::tempdir().unwrap();
    let token_file = root.path().join("home/token");
    fs::write_atomic(&token_file, b"hf_from_file\n").unwrap();
    let other = root.path().join("other token");
    fs::write_atomic(&other, b" hf_other ").unwrap();
    let home = root.path().join("home").to_str().unwrap().to_owned();
    let user = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
    let of = |pairs: &[(&str, &str)]| {
        let env = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let settings = hub::Settings::of(&env).unwrap();
        (settings.cache.clone(), settings.token().map(str::to_owned))
    };
    let path = PathBuf::from;
    assert_eq!(of(&[(user, "/u")]).0, path("/u").join(".cache/huggingface/hub"));
    assert_eq!(of(&[(user, "/u"), ("XDG_CACHE_HOME", "/x")]).0, path("/x/huggingface/hub"));
    assert_eq!(of(&[(user, "/u"), ("HF_HOME", "~/h")]).0, path("/u/h/hub"));
    assert_eq!(of(&[("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")]).0, path("/old"));
    assert_eq!(of(&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")]).0, path("/new"));
    assert_eq!(of(&[("HF_HOME", &home)]).1.as_deref(), Some("hf_from_file"));
    assert_eq!(of(&[("HF_HOME", &home), ("HF_HUB_CACHE", "/c")]).1.as_deref(), Some("hf_from_file"));
    assert_eq!(of(&[("HF_HOME", &home), ("HF_TOKEN", "hf_env\n")]).1.as_deref(), Some("hf_env"));
    assert_eq!(of(&[("HF_HOME", &home), ("HF_TOKEN_PATH", other.to_str().unwrap())]).1.as_deref(), Some("hf_other"));
    assert_eq!(of(&[("HF_HOME", &home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).1, None);
    assert_eq!(of(&[("HF_HOME", &home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")]).1.as_deref(), Some("hf_from_file"));
    assert_eq!(
        of(&[("HF_HOME", "$SCRATCH/${WHO}/$NOBODY"), ("SCRATCH", "/s"), ("WHO", "w")]).0,
        path("/s/w/$NOBODY/hub")
    );
    assert_eq!(of(&[("HF_HOME", &home), ("HUGGING_FACE_HUB_TOKEN", "hf_old")]).1.as_deref(), Some("hf_old"));
    assert_eq!(
        of(&[("HF_TOKEN", "hf_new"), ("HUGGING_FACE_HUB_TOKEN", "o"), (user, "/u")]).1.as_deref(),
        Some("hf_new")
    );
    assert!(hub::Settings::of(&BTreeMap::new()).is_err());
    for (hub, transformers, offline) in [("", "1", true), ("0", "1", false), ("1", "0", true), ("", "", false)] {
        let pairs = [("HF_HUB_OFFLINE", hub), ("TRANSFORMERS_OFFLINE", transformers), (user, "/u")];
        let env = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        assert_eq!(hub::Settings::of(&env).unwrap().offline, offline, "{pairs:?}");
    }
}

#[test]
fn a_file_of_certificates_is_read_and_must_be_there() {
    let mut bench = Bench::good();
    let file = bench.cache().join("roots.pem");
    bench.set("SSL_CERT_FILE", file.to_str().unwrap());
    let error = bench.world.http().unwrap_err();
    assert!(error.to_string().contains("roots.pem"), "{error}");
    fs::write_atomic(&file, b"PEM").unwrap();
    assert_eq!(bench.world.http().unwrap().settings().certificates.as_deref(), Some(&b"PEM"[..]));
}

#[cfg(unix)]
#[test]
fn colleagues_can_wait_for_locks_too() {
    use std::os::unix::fs::PermissionsExt as _;
    let bench = Bench::good();
    bench.push(&[("a.gguf", &noise(50_000, 9))]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    bench.fetch(&pin).unwrap();
    let locks = fs::read_dir(&bench.cache().join("../.locks/models--Org--Tiny-Model_1.0-gguf")).unwrap();
    let modes: Vec<u32> = locks.iter().map(|lock| fs::metadata(lock).unwrap().permissions().mode() & 0o777).collect();
    assert_eq!(modes, [0o664]);
}
