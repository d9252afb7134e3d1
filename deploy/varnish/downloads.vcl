vcl 4.1;

# Varnish as a shared cache in front of the service, for public files. Start it with
#
#   varnishd -F -a 127.0.0.1:8080 -f "$PWD/deploy/varnish/downloads.vcl" -s malloc,1g -p http_gzip_support=off
#
# Without the last option Varnish would compress and decompress what the service sends, and weaken its entity tags.

import directors;
import std;

backend replica1 {
    .host = "127.0.0.1";
    .port = "8000";
    .probe = { .url = "/-/readyz"; .interval = 2s; .timeout = 2s; .window = 2; .threshold = 1; .initial = 1; }
}

# The addresses that may purge: add those of your deployment.
acl purgers {
    "127.0.0.1";
    "::1";
}

sub vcl_init {
    # Requests for one path go to one replica. Add a backend above and a line here for each
    # replica.
    new replicas = directors.shard();
    replicas.add_backend(replica1);
    replicas.reconfigure();
}

sub vcl_recv {
    # Pages of the service that are not for clients, however they are spelled.
    if (req.url ~ "^/(-|%2[dD])(/|%2[fF])" && req.url !~ "^/-/livez(\?|$)") {
        return (synth(404));
    }
    # These headers are orders of an application to its proxy. A client must not send them.
    unset req.http.X-Accel-Mapping;
    unset req.http.X-Accel-Redirect;
    unset req.http.X-Sendfile;
    unset req.http.X-Sendfile-Type;
    unset req.http.Forwarded;
    set req.http.X-Forwarded-For = client.ip;
    set req.http.X-Forwarded-Host = req.http.Host;
    set req.http.X-Forwarded-Proto = "http";

    if (req.method == "PURGE" || req.method == "BAN") {
        if (client.ip !~ purgers) {
            return (synth(405));
        }
        if (req.method == "PURGE") {
            return (purge);
        }
        # All URLs that begin with this one.
        if (std.ban("obj.http.X-Cached-Url ~ ^" + regsuball(req.url, "[][\\.?*+^$(){}|]", "\\\0"))) {
            return (synth(200, "Banned"));
        }
        return (synth(400, std.ban_error()));
    }

    set req.backend_hint = replicas.backend(by=KEY, key=replicas.key(regsub(req.url, "\?.*", "")));
    # A stale answer is sent for long only while no replica can serve.
    if (std.healthy(req.backend_hint)) {
        set req.grace = 10s;
    }
}

sub vcl_backend_response {
    set beresp.http.X-Cached-Url = bereq.url;
    # A stale answer is better than an error. The other answers with errors are not kept.
    if (beresp.status >= 500 && bereq.is_bgfetch) {
        return (abandon);
    }
    # Only what the service marks: `cache_control = "public, max-age=3600"` of a route. Private answers say that they are
    # private, and Varnish keeps none of them.
    if (beresp.http.Cache-Control !~ "(max-age|s-maxage)=" || beresp.status >= 400) {
        set beresp.uncacheable = true;
        set beresp.ttl = 60s;
        return (deliver);
    }
    # A larger file would take the place of many small ones: it is not kept, and its ranges are asked of the service.
    if (std.integer(beresp.http.Content-Length, 0) > 268435456) {
        set beresp.uncacheable = true;
        set beresp.ttl = 60s;
        return (deliver);
    }
    set beresp.grace = 6h;
}

sub vcl_deliver {
    unset resp.http.X-Cached-Url;
    unset resp.http.X-Varnish;
    unset resp.http.Via;
}
