//! The gateway's page: one file, embedded, that asks nothing of anybody else.

use hyper::header::HeaderValue;
use hyper::{Response, StatusCode};

use super::body::{self, Body};

/// The page. A browser runs only what is in it, and sends only to where it came from.
pub fn index() -> Response<Body> {
    let mut response = body::typed(StatusCode::OK, "text/html; charset=utf-8", include_str!("page/index.html"));
    let headers = response.headers_mut();
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                  img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    headers.insert("content-security-policy", HeaderValue::from_static(policy));
    headers.insert("referrer-policy", HeaderValue::from_static("no-referrer"));
    headers.insert("cache-control", HeaderValue::from_static("no-cache"));
    response
}
