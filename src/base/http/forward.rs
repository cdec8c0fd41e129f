//! Plain `http` through a proxy, as RFC 9112, section 3.2.2, has it: the request goes to the proxy with the whole address in its
//! first line. ureq by itself asks for a tunnel, which many proxies allow to port 443 alone.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, TcpConnector, Transport};
use ureq::{Agent, Error, Proxy};

/// An agent whose every connection leads to `proxy`.
pub(super) fn agent(config: Config, proxy: &Proxy) -> Agent {
    let authorization = proxy.username().map(|user| {
        let credentials = STANDARD.encode(format!("{user}:{}", proxy.password().unwrap_or_default()));
        format!("Proxy-Authorization: Basic {credentials}\r\n")
    });
    let connector =
        ().chain(TcpConnector::default()).chain(Forward { authorization: authorization.unwrap_or_default() });
    Agent::with_parts(config, connector, ToProxy { proxy: proxy.uri().clone(), resolver: DefaultResolver::default() })
}

/// Connects to the proxy, whatever the target host is.
#[derive(Debug)]
struct ToProxy {
    proxy: Uri,
    resolver: DefaultResolver,
}

impl Resolver for ToProxy {
    fn resolve(&self, _: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        self.resolver.resolve(&self.proxy, config, timeout)
    }
}

struct Forward {
    /// The header line with credentials, or nothing.
    authorization: String,
}

impl std::fmt::Debug for Forward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forward").finish_non_exhaustive()
    }
}

impl<In: Transport> Connector<In> for Forward {
    type Out = Forwarded<In>;

    fn connect(&self, details: &ConnectionDetails<'_>, chained: Option<In>) -> Result<Option<Self::Out>, Error> {
        let authority = details.uri.authority().map_or("", |authority| authority.as_str());
        let host = authority.rsplit('@').next().unwrap_or_default();
        let (origin, authorization) = (format!("http://{host}"), self.authorization.clone());
        Ok(chained.map(|inner| Forwarded { inner, origin, authorization, begins: true }))
    }
}

/// A connection to the proxy, for requests to one origin.
struct Forwarded<T> {
    inner: T,
    origin: String,
    authorization: String,
    /// What is sent next begins a request.
    begins: bool,
}

impl<T: std::fmt::Debug> std::fmt::Debug for Forwarded<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forwarded").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<T: Transport> Transport for Forwarded<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        if !std::mem::take(&mut self.begins) {
            return self.inner.transmit_output(amount, timeout);
        }
        let begin = rewritten(&self.inner.buffers().output()[..amount], &self.origin, &self.authorization);
        let mut rest = begin.as_slice();
        while !rest.is_empty() {
            let output = self.inner.buffers().output();
            let (now, later) = rest.split_at(rest.len().min(output.len()));
            output[..now.len()].copy_from_slice(now);
            self.inner.transmit_output(now.len(), timeout)?;
            rest = later;
        }
        Ok(())
    }

    /// Once an answer is awaited, the next thing sent is another request.
    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.begins = true;
        self.inner.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }
}

/// `GET /x HTTP/1.1…` becomes `GET http://host/x HTTP/1.1…`, with the proxy's own header after the first line.
fn rewritten(begin: &[u8], origin: &str, authorization: &str) -> Vec<u8> {
    let target = begin.iter().position(|byte| *byte == b' ').map_or(0, |at| at + 1);
    let line = begin.windows(2).position(|two| two == b"\r\n").map_or(begin.len(), |at| at + 2);
    [&begin[..target], origin.as_bytes(), &begin[target..line], authorization.as_bytes(), &begin[line..]].concat()
}
