"""The API's own description, for programs and for people; complete without the internet."""

from importlib.resources import as_file, files

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

from gpustack.errors import NotFound
from gpustack.server.auth.principals import AnyUser

router = APIRouter(include_in_schema=False)

OPENAPI, ASSETS = "/openapi.json", "/docs/assets"
#: Files of a package that is there to carry them.
KNOWN = ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png")
#: The pages may load nothing from elsewhere, and nobody may frame them. Both viewers start with an
#: inline script and style their parts inline.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; worker-src blob:; "
    "base-uri 'none'; form-action 'self'; object-src 'none'; frame-ancestors 'none'"
)


@router.get(OPENAPI)
async def openapi(request: Request, user: AnyUser) -> JSONResponse:
    return JSONResponse(request.app.openapi())


@router.get("/docs")
async def docs(request: Request, user: AnyUser) -> HTMLResponse:
    """Every route, to read and to try."""
    page = get_swagger_ui_html(
        openapi_url=OPENAPI,
        title=request.app.title,
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon.png",
    )
    return _confined(page)


@router.get("/redoc")
async def redoc(request: Request, user: AnyUser) -> HTMLResponse:
    """Every route, to read."""
    page = get_redoc_html(
        openapi_url=OPENAPI,
        title=request.app.title,
        redoc_js_url=f"{ASSETS}/redoc.standalone.js",
        redoc_favicon_url=f"{ASSETS}/favicon.png",
        with_google_fonts=False,
    )
    return _confined(page)


@router.get(f"{ASSETS}/{{name}}")
async def asset(user: AnyUser, name: str) -> FileResponse:
    if name not in KNOWN:
        raise NotFound(f"there is no {ASSETS}/{name}")
    with as_file(files("fastapi_offline") / "static" / name) as path:
        return FileResponse(path, headers={"Cache-Control": "private, max-age=86400"})


def _confined(page: HTMLResponse) -> HTMLResponse:
    page.headers["Content-Security-Policy"] = POLICY
    return page
