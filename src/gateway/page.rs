//! The gateway's page: one file, embedded, that asks nothing of anybody else.
//!
//! Its policy names the digests of its one style and its one script. A browser therefore runs and applies nothing else, whatever
//! text gets into the page, and refuses to turn text into HTML at all (trusted types).

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::header::HeaderValue;
use hyper::{Response, StatusCode};

use super::body::{self, Body};
use crate::base::digest::Digest;

const HTML: &str = include_str!("page/index.html");

static POLICY: LazyLock<String> = LazyLock::new(|| {
    let [style, script] = ["style", "script"].map(|tag| source(between(HTML, tag)));
    format!(
        "default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
});

/// What is between the tags of the only element of that name.
fn between<'a>(html: &'a str, tag: &str) -> &'a str {
    let inner = html.split_once(&format!("<{tag}>")).and_then(|(_, rest)| rest.split_once(&format!("</{tag}>")));
    inner.map_or("", |(inner, _)| inner)
}

/// The source expression for an inline element of that text (<https://www.w3.org/TR/CSP3/#match-element-to-source-list>).
fn source(text: &str) -> String {
    // Browsers hash the text as they parsed it: with line feeds alone.
    format!("'sha256-{}'", STANDARD.encode(Digest::of(text.replace("\r\n", "\n").as_bytes()).as_bytes()))
}

/// The page.
pub fn index() -> Response<Body> {
    let mut response = body::typed(StatusCode::OK, "text/html; charset=utf-8", HTML);
    let headers = response.headers_mut();
    // Base64 and the words above are valid in a header.
    if let Ok(policy) = HeaderValue::try_from(POLICY.as_str()) {
        headers.insert("content-security-policy", policy);
    }
    headers.insert("referrer-policy", HeaderValue::from_static("no-referrer"));
    headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    headers.insert("cache-control", HeaderValue::from_static("no-cache"));
    response
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use http_body_util::BodyExt as _;

    use super::*;

    /// The values of an attribute.
    fn values<'a>(html: &'a str, attribute: &str) -> BTreeSet<&'a str> {
        let opening = format!(" {attribute}=\"");
        html.split(opening.as_str()).skip(1).filter_map(|rest| rest.split('"').next()).collect()
    }

    #[tokio::test]
    async fn it_is_served_whole_with_a_policy_that_names_its_style_and_script() {
        let response = index();
        assert_eq!(response.status(), StatusCode::OK);
        let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(header("content-type"), "text/html; charset=utf-8");
        assert_eq!(header("cache-control"), "no-cache");
        assert_eq!(header("referrer-policy"), "no-referrer");
        assert_eq!(header("cross-origin-resource-policy"), "same-origin");
        let policy = header("content-security-policy");
        for part in [
            "default-src 'none'",
            "connect-src 'self'",
            "frame-ancestors 'none'",
            "form-action 'none'",
            "base-uri 'none'",
            "require-trusted-types-for 'script'",
        ] {
            assert!(policy.split("; ").any(|directive| directive == part), "{part} is not in {policy}");
        }
        assert!(!policy.contains("unsafe"), "{policy}");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, HTML.as_bytes());
        for tag in ["style", "script"] {
            assert!(between(HTML, tag).len() > 1000, "{tag}");
            assert!(policy.contains(&source(between(HTML, tag))), "{tag}");
        }
    }

    #[test]
    fn hashes_are_those_of_browsers() {
        // The example of the specification of content security policies, level 2.
        assert_eq!(source("alert('Hello, world.');"), "'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='");
        assert_eq!(source("a\r\nb"), source("a\nb"));
    }

    #[test]
    fn it_loads_nothing_and_sends_nothing_elsewhere() {
        for tag in ["style", "script"] {
            assert_eq!(HTML.matches(&format!("<{tag}")).count(), 1, "<{tag}> with attributes, or a second one");
        }
        for word in ["://", "src=", "srcset=", "@import", "url(", "action=", "<iframe", "<object", "<embed", "<base"] {
            assert!(!HTML.contains(word), "`{word}` is in the page");
        }
        let icon = values(HTML, "href").into_iter().filter(|href| !href.starts_with('#')).collect::<Vec<_>>();
        assert!(matches!(icon.as_slice(), [icon] if icon.starts_with("data:image/png;base64,")), "{icon:?}");
        let script = between(HTML, "script");
        for call in script.split("fetch(").skip(1) {
            assert!(call.starts_with("path"), "only `ask` sends, and only to paths: {}", &call[..20]);
        }
        for call in script.split("ask(").skip(1).filter(|call| !call.starts_with("path")) {
            assert!(call.starts_with("\"/") && !call.starts_with("\"//"), "{}", &call[..20]);
        }
    }

    #[test]
    fn text_never_becomes_html_or_code() {
        let script = between(HTML, "script");
        for word in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "setHTML",
            "document.write",
            "DOMParser",
            "eval(",
            "Function(",
            "setAttribute(\"on",
            "localStorage",
            "document.cookie",
        ] {
            assert!(!script.contains(word), "`{word}` is in the script");
        }
        let markup = HTML.replace(script, "");
        let handlers = markup.split_whitespace().filter(|word| word.starts_with("on") && word.contains("=\""));
        assert_eq!(handlers.count(), 0);
        assert_eq!(values(&markup, "style").len(), 0, "the policy refuses style attributes");
    }

    #[test]
    fn what_is_referred_to_exists() {
        let ids = values(HTML, "id");
        for attribute in ["for", "aria-labelledby", "aria-describedby"] {
            for id in values(HTML, attribute) {
                assert!(ids.contains(id), "{attribute}=\"{id}\"");
            }
        }
        let script = between(HTML, "script");
        let used = script.split("byId(\"").skip(1).filter_map(|rest| rest.split('"').next());
        let used: BTreeSet<&str> = used.collect();
        assert!(used.len() > 5, "{used:?}");
        assert!(used.is_subset(&ids), "{:?}", used.difference(&ids));
        for control in ["<input", "<textarea", "<select"] {
            for tag in HTML.split(control).skip(1).filter_map(|rest| rest.split('>').next()) {
                let id = values(tag, "id").into_iter().next().unwrap_or_default();
                assert!(values(HTML, "for").contains(id), "no label for {control}{tag}>");
            }
        }
    }
}
