//! The page at `/`: try a prompt, watch it stream, see the metrics. Plain files, part of the program, nothing from elsewhere.

use axum::response::Response;
use hyper::header::{CONTENT_SECURITY_POLICY, HeaderValue};

use crate::body::of_type;

/// `GET /`
pub async fn html() -> Response {
    let mut response = of_type("text/html; charset=utf-8", include_str!("page/page.html"));
    let own = HeaderValue::from_static(
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'",
    );
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, own);
    response
}

/// `GET /page.css`
pub async fn css() -> Response {
    of_type("text/css; charset=utf-8", include_str!("page/page.css"))
}

/// `GET /page.js`
pub async fn js() -> Response {
    of_type("text/javascript; charset=utf-8", include_str!("page/page.js"))
}
