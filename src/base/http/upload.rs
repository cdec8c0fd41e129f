//! Requests whose body is a stream, for files that do not fit in memory.

use std::io::Read;
use std::time::Duration;

use ureq::SendBody;

use super::{Http, HttpError, Method, Request, Response, build, parse, shown};

/// The slowest that a server may look through what it was sent before it answers.
const MIN_BYTES_PER_SECOND: u64 = 20_000_000;

impl Http {
    /// Sends `size_bytes` of `body` and gives the answer, whatever its status. A redirect is an answer, too. Headers may hold
    /// secrets: the address must be one that may know them. `body` can stop the request by an error.
    ///
    /// # Errors
    /// [`HttpError`].
    pub fn upload(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: &mut dyn Read,
        size_bytes: u64,
    ) -> Result<Response, HttpError> {
        self.settings.cancel.check()?;
        let url = parse(url)?;
        if self.settings.offline {
            return Err(HttpError::Offline { url: shown(url.as_str()) });
        }
        let length = size_bytes.to_string();
        let headers: Vec<(&str, &str)> = headers.iter().copied().chain([("content-length", &*length)]).collect();
        let request = Request { headers: &headers, ..Request::get(url.as_str(), &[]) };
        let (parts, ()) = build(&request, &method, &url, true, true)?.into_parts();
        let (agent, proxy) = self.agent_for(&url)?;
        let patience = self.settings.stall_timeout * 2 + Duration::from_secs(size_bytes / MIN_BYTES_PER_SECOND);
        let request = ureq::http::Request::from_parts(parts, SendBody::from_reader(body));
        let request = agent.configure_request(request).timeout_recv_response(Some(patience)).build();
        self.answered(&url, proxy.as_deref(), agent.run(request))
    }
}
