use super::*;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;

use crate::base::test_server::{Reply, Server};

fn http(change: impl FnOnce(&mut Settings)) -> Http {
    let mut settings = Settings { pace: Duration::from_millis(1), ..Settings::default() };
    change(&mut settings);
    Http::new(settings)
}

#[test]
fn secrets_stay_at_their_origin() {
    let other = Server::start(|_, _| Reply::text("there"));
    let target = other.url("/moved?x=1");
    let first = Server::start(move |seen, _| match seen.path.as_str() {
        "/a/b" => Reply::redirect(307, "../c d"),
        _ => Reply::redirect(302, &target),
    });
    let headers = [("Authorization", "Bearer secret"), ("X-Token", "secret"), ("Range", "bytes=0-4")];
    let answer = http(|_| ()).answer(&Request::get(&first.url("/a/b"), &headers), 100).unwrap();
    assert_eq!((answer.response.status, answer.body.as_slice()), (200, &b"there"[..]));
    assert_eq!(first.seen()[1].path, "/c%20d");
    assert_eq!(first.seen()[1].header("authorization"), Some("Bearer secret"));
    let there = &other.seen()[0];
    assert_eq!((there.header("authorization"), there.header("x-token")), (None, None));
    assert_eq!((there.header("range"), there.header("accept-encoding")), (Some("bytes=0-4"), Some("identity")));
    assert_eq!(there.header("user-agent"), Some(concat!("aitools/", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn redirects_end_somewhere() {
    let server = Server::start(|_, _| Reply::redirect(302, "/again"));
    let error = http(|_| ()).send(&Request::get(&server.url("/"), &[])).unwrap_err();
    assert!(error.to_string().ends_with("more than 10 redirects"), "{error}");
    assert_eq!(server.seen().len(), 11);
    let url = server.url("/");
    let stay = Request { follow: Follow::Nowhere, ..Request::head(&url, &[]) };
    assert_eq!(http(|_| ()).send(&stay).unwrap().status, 302);
    let server = Server::start(|_, _| Reply::redirect(302, "file:///etc/passwd"));
    assert!(matches!(http(|_| ()).send(&Request::get(&server.url("/"), &[])), Err(HttpError::Address { .. })));
}

/// An https server on the loopback address; gives its address and its certificate.
fn secure_server(answer: &'static str) -> (String, Vec<u8>) {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let pem = made.cert.pem().into_bytes();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder().with_no_client_auth();
    let config = Arc::new(config.with_single_cert(vec![made.cert.der().clone()], key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("https://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let session = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = rustls::StreamOwned::new(session, stream);
            // What does not trust the certificate goes away here.
            if stream.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {
                write!(stream, "HTTP/1.1 {answer}\r\nContent-Length: 2\r\n\r\nok").unwrap();
            }
        }
    });
    (address, pem)
}

/// A proxy that makes tunnels; gives its address and the first lines it was sent.
fn tunnels() -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let lines = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&lines);
    std::thread::spawn(move || {
        for mut here in listener.incoming().map_while(Result::ok) {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                here.read_exact(&mut byte).unwrap();
                head.push(byte[0]);
            }
            let head = String::from_utf8(head).unwrap();
            let target = head.split(' ').nth(1).unwrap();
            let mut there = TcpStream::connect(target).unwrap();
            seen.lock().unwrap().push(head.lines().next().unwrap().to_owned());
            write!(here, "HTTP/1.1 200 Connected\r\n\r\n").unwrap();
            let (mut from, mut to) = (here.try_clone().unwrap(), there.try_clone().unwrap());
            std::thread::spawn(move || io::copy(&mut from, &mut to));
            std::thread::spawn(move || io::copy(&mut there, &mut here));
        }
    });
    (address, lines)
}

#[test]
fn https_is_spoken_with_whom_the_certificates_name_also_through_a_tunnel() {
    let (url, pem) = secure_server("200 OK");
    let error = http(|_| ()).send(&Request::get(&url, &[])).unwrap_err().to_string();
    assert!(error.contains("certificate") && error.contains("SSL_CERT_FILE"), "{error}");
    let trusting = |settings: &mut Settings| settings.certificates = Some(pem.clone());
    assert_eq!(http(trusting).answer(&Request::get(&url, &[]), 100).unwrap().body, b"ok");

    let (proxy, seen) = tunnels();
    let through = http(|settings| {
        trusting(settings);
        settings.env.insert("HTTPS_PROXY".to_owned(), proxy.clone());
    });
    let headers = [("Authorization", "Bearer secret")];
    assert_eq!(through.answer(&Request::get(&url, &headers), 100).unwrap().body, b"ok");
    let host = url.trim_start_matches("https://");
    assert_eq!(*seen.lock().unwrap(), [format!("CONNECT {host} HTTP/1.1")]);

    let (insecure, pem) = secure_server("302 Found\r\nLocation: http://elsewhere.test/f");
    let trusting = http(|settings| settings.certificates = Some(pem.clone()));
    let error = trusting.send(&Request::get(&insecure, &[])).unwrap_err().to_string();
    assert!(error.contains("from https to http://elsewhere.test/f"), "{error}");
}

#[test]
fn offline_sends_nothing() {
    let server = Server::start(|_, _| Reply::text(""));
    let error = http(|settings| settings.offline = true).send(&Request::get(&server.url("/"), &[])).unwrap_err();
    assert!(matches!(error, HttpError::Offline { .. }));
    assert!(server.seen().is_empty());
}

#[test]
fn a_proxy_is_used_unless_no_proxy_covers_the_host() {
    // Port 9 of the loopback address refuses, so an answer shows that the proxy was not used.
    let server = Server::start(|_, _| Reply::text("direct"));
    let url = server.url("/");
    let with = |no_proxy: &str| {
        http(|settings| {
            settings.env.insert("HTTP_PROXY".to_owned(), "http://user:secret@127.0.0.1:9".to_owned());
            settings.env.insert("NO_PROXY".to_owned(), no_proxy.to_owned());
        })
    };
    let error = with("example.org").send(&Request::get(&url, &[])).unwrap_err().to_string();
    assert!(error.contains("through the proxy http://127.0.0.1:9") && !error.contains("secret"), "{error}");
    assert_eq!(with("x, 127.0.0.0/8").send(&Request::get(&url, &[])).unwrap().status, 200);
}

/// As squid and its like are asked: no tunnel, the whole address in the first line, on one connection again and again.
#[test]
fn a_proxy_is_given_whole_addresses_of_plain_http() {
    let proxy = Server::start(|seen, _| Reply::text(&format!("{} {}", seen.method, seen.path)));
    let address = proxy.url("").replace("http://", "http://us%65r:pass@");
    let http = http(|settings| drop(settings.env.insert("http_proxy".to_owned(), address.clone())));
    let target = "http://hub.example.invalid:8080/a?b=c";
    for _ in 0..2 {
        let answer = http.answer(&Request::get(target, &[]), 100).unwrap();
        assert_eq!(answer.body, format!("GET {target}").into_bytes());
    }
    let body = Request { method: Method::POST, body: Some(b"body"), ..Request::get(target, &[]) };
    http.send(&body).unwrap();
    for seen in proxy.seen() {
        assert_eq!(seen.header("proxy-authorization"), Some("Basic dXNlcjpwYXNz"));
        assert_eq!(seen.header("host"), Some("hub.example.invalid:8080"));
    }
    assert_eq!(proxy.seen().last().map(|seen| seen.body.clone()), Some(b"body".to_vec()));
}

#[test]
fn no_proxy_entries() {
    let url: Url = "https://a.example.org/x".parse().unwrap();
    for yes in ["*", "example.org", ".example.org", "*.example.org", "b,a.example.org", "a.example.org:443"] {
        assert!(bypasses(yes, &url), "{yes}");
    }
    for no in ["", "le.org", "a.example.org:80", "10.0.0.0/8", "b.a.example.org"] {
        assert!(!bypasses(no, &url), "{no}");
    }
    let url: Url = "http://[fd00::1]:80/".parse().unwrap();
    assert!(bypasses("fd00::/8", &url) && bypasses("[fd00::1]", &url) && !bypasses("fe00::/8", &url));
}

#[test]
fn patience_has_an_end_and_obeys_the_server() {
    let server = Server::start(|_, turn| match turn {
        0 => Reply::text("busy").status(429).with("Retry-After", "0"),
        1 => Reply::text("broken").drop_after(2),
        _ => Reply::text("{\"a\": 1}"),
    });
    let answer = http(|_| ()).answer_patiently(&Request::get(&server.url("/"), &[]), 100, &|_| ()).unwrap();
    assert_eq!(answer.json::<serde_json::Value>().unwrap()["a"], 1);
    let server = Server::start(|_, _| Reply::text("").status(503));
    let answer = http(|_| ()).answer_patiently(&Request::get(&server.url("/"), &[]), 100, &|_| ()).unwrap();
    assert_eq!((answer.response.status, server.seen().len()), (503, 7));
    let server = Server::start(|_, _| Reply::text("").status(429).with("Retry-After", "86400"));
    let answer = http(|_| ()).answer_patiently(&Request::get(&server.url("/"), &[]), 100, &|_| ()).unwrap();
    assert_eq!((answer.response.status, server.seen().len()), (429, 1));
}

#[test]
fn large_answers_and_silence_are_errors() {
    let server = Server::start(|_, _| Reply::text("12345"));
    let ask = |http: &Http, server: &Server| http.answer(&Request::get(&server.url("/"), &[]), 4);
    assert!(matches!(ask(&http(|_| ()), &server), Err(HttpError::TooLarge { limit_bytes: 4, .. })));
    let silent = Server::start(|_, _| Reply::text("12345").stall_after(2));
    let impatient = http(|settings| settings.stall_timeout = Duration::from_millis(50));
    assert!(matches!(ask(&impatient, &silent), Err(HttpError::Broken { .. })));
}

#[test]
fn a_cancel_ends_a_silent_request() {
    let cancel = Cancel::default();
    let later = cancel.clone();
    let silent = Server::start(move |_, _| {
        later.cancel();
        Reply::text("12345").stall_after(2)
    });
    let http = http(|settings| settings.cancel = cancel);
    let error = http.answer(&Request::get(&silent.url("/"), &[]), 100).unwrap_err();
    assert!(matches!(error, HttpError::Cancelled(_)), "{error}");
}

#[test]
fn a_post_carries_its_body() {
    let server = Server::start(|seen, _| Reply::text(&format!("{} {}", seen.method, seen.body.len())));
    let headers = [("Content-Type", "text/plain")];
    let request = Request { method: Method::POST, body: Some(b"12345"), ..Request::get("", &headers) };
    let answer = http(|_| ()).answer(&Request { url: &server.url("/"), ..request }, 100).unwrap();
    assert_eq!(answer.body, b"POST 5");
    assert_eq!(server.seen()[0].header("content-type"), Some("text/plain"));
}

#[test]
fn waits_are_read() {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777 - 5);
    assert_eq!(wait_from("12", now), Some(Duration::from_secs(12)));
    assert_eq!(wait_from("Sun, 06 Nov 1994 08:49:37 GMT", now), Some(Duration::from_secs(5)));
    assert_eq!(wait_from("Sat, 06 Nov 1993 08:49:37 GMT", now), Some(Duration::ZERO));
    assert_eq!(wait_from("18446744073709551615", now), Some(Duration::from_secs(u64::MAX)));
    assert_eq!(wait_from("Sunday, 06-Nov-94 08:49:37 GMT", now), Some(Duration::from_secs(5)));
    for bad in ["", "soon", "-1", "Sun, 06 Nov", "Sun, 99 Foo 1994 08:49:37 GMT"] {
        assert_eq!(wait_from(bad, now), None, "{bad}");
    }
}

#[test]
fn shown_addresses_hold_no_secrets() {
    assert_eq!(shown("https://u:p@host/a@b?sig=1#f"), "https://host/a@b");
    assert_eq!(shown("u:p@host:1"), "host:1");
}

#[test]
fn m3_a_connection_that_trickles_counts_as_broken() {
    let mut pace = Pace { window: Duration::from_secs(30), waited: Duration::ZERO, bytes: 0 };
    for _ in 0..29 {
        pace.note(Duration::from_secs(1), 1).unwrap();
    }
    assert!(pace.note(Duration::from_secs(1), 1).unwrap_err().to_string().contains("bytes per second"));
    for _ in 0..100 {
        pace.note(Duration::from_secs(1), 1001).unwrap();
    }
    // Over a real connection: a byte now and then, each long before the stall limit.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let trickle = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let _ = stream.read(&mut [0; 4096]);
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n").unwrap();
        let began = std::time::Instant::now();
        while began.elapsed() < Duration::from_secs(20) && stream.write_all(b"x").is_ok() {
            std::thread::park_timeout(Duration::from_millis(20));
        }
    });
    let hurried = http(|settings| settings.stall_timeout = Duration::from_millis(400));
    let error = hurried.answer(&Request::get(&url, &[]), 1 << 20).unwrap_err();
    assert!(matches!(&error, HttpError::Broken { why, .. } if why.contains("bytes per second")), "{error}");
    trickle.join().unwrap();
}

#[test]
fn l4_a_wait_that_is_too_long_is_told() {
    let server = Server::start(|_, _| Reply::text("").status(429).with("Retry-After", "1000"));
    let told = Mutex::new(Vec::new());
    let url = server.url("/f");
    let answer = http(|_| ()).answer_patiently(&Request::get(&url, &[]), 10, &|text| told.lock().unwrap().push(text));
    assert_eq!((answer.unwrap().response.status, server.seen().len()), (429, 1));
    let told = told.into_inner().unwrap();
    assert!(told.len() == 1 && told[0].contains("1000 s"), "{told:?}");
}
