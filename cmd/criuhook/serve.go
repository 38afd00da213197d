// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"criuhook/criuhook/rule"
	"criuhook/criuhook/service"
	"criuhook/sockpeer"
)

const serveLong = `Serve CRIU's RPC on a unix socket of type seqpacket, in place of "criu service":
programs that use libcriu, or speak the protocol themselves, connect to it and have
processes dumped and restored. Each request has a CRIU of its own.

A socket that systemd passes on (LISTEN_FDS) is used instead of one of ours, and
systemd is told when the service is ready (NOTIFY_SOCKET).

Root may do everything. Users and groups that the configuration names may have
their own processes dumped:

  service:
    uids: [1000]
    gids: [2000]

SIGTERM and SIGINT end the service: no new request begins, those under way come to
their end. After a second signal, or the time that the configuration says
(service: drain), they are made to give up: what was to be dumped runs on.`

func newServe(o *options) *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "serve [--listen PATH]",
		Short: "Serve CRIU's RPC on a socket",
		Long:  serveLong,
		Example: `  criuhook serve
  criuhook serve --listen /run/checkpoint/criu.sock`,
		DisableFlagsInUseLine: true,
		Args:                  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.serve(cmd.Context(), path, cmd.Flags().Changed("listen"), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&path, "listen", service.DefaultSocket, "`PATH` of the socket")
	o.criuFlag(cmd)
	_ = cmd.MarkFlagFilename("listen")
	return cmd
}

// newBecome is the verb by which the service starts a CRIU with the rights of a
// client.
func newBecome() *cobra.Command {
	client := &service.Client{}
	var groups []uint
	cmd := &cobra.Command{
		Use:    service.BecomeVerb,
		Short:  "Become a CRIU with the rights of a client of the service (internal)",
		Hidden: true,
		Args:   cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			for _, g := range groups {
				client.Groups = append(client.Groups, uint32(g))
			}
			return service.Become(client, args[0], args[1:], os.Environ())
		},
	}
	cmd.Flags().Uint32Var(&client.UID, "uid", 0, "its uid")
	cmd.Flags().Uint32Var(&client.GID, "gid", 0, "its gid")
	cmd.Flags().UintSliceVar(&groups, "groups", nil, "its supplementary groups")
	return cmd
}

func (o *options) serve(ctx context.Context, path string, named bool, stderr io.Writer) error {
	o.logs = true
	log, err := newLogger(stderr, o.log)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 || sockpeer.Elevated() {
		return errors.New("serve: has to be started by root: it makes CRIU dump processes of every user, and decides itself what clients may do")
	}
	rules, err := o.config.load()
	if err != nil {
		return err // rather than to refuse one request after the other
	}
	criu, err := findCRIU(log, o.criu, o.config)
	if err != nil {
		return err
	}
	// Before there is a socket, which a signal would leave behind.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(signals)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	hurry, now := context.WithCancel(context.WithoutCancel(ctx))
	defer now()
	go func() {
		for sig := range signals {
			if sig == unix.SIGHUP {
				log.Info("there is nothing to reload: the configuration is read for each client, but for the limits of the service and the mode of its socket, which a restart changes")
				continue
			}
			if ctx.Err() != nil {
				now()
				continue
			}
			log.Infof("%v: the service ends", sig)
			notify(log, daemon.SdNotifyStopping)
			cancel()
		}
	}()
	listener, err := o.listener(path, named, rules)
	if err != nil {
		return err
	}
	defer listener.Close()

	server := &service.Server{
		Config: o.config.load,
		Limits: rules.Service,
		Log:    log,
		Work: &service.Relay{
			CRIU:    criu,
			Version: version,
			NewLog: func(w io.Writer) (*logrus.Logger, error) {
				l, err := newLogger(w, logOptions{level: o.log.level})
				if err == nil {
					l.SetOutput(w) // not where CRIUHOOK_LOG_FILE says
				}
				return l, err
			},
		},
	}
	if listener.Path != "" {
		log.Infof("serving on %s, with %s", listener.Path, criu)
	} else {
		log.Infof("serving on the socket that systemd passed, with %s", criu)
	}
	notify(log, daemon.SdNotifyReady)
	if err := server.Serve(ctx, hurry, listener); err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	log.Info("the service has ended")
	return nil
}

// listener is systemd's, or else one of ours.
func (o *options) listener(path string, named bool, rules *rule.Set) (*service.Listener, error) {
	l, err := service.Activated()
	switch {
	case err != nil:
		return nil, err
	case l != nil && named:
		return nil, errors.Join(usagef("serve: systemd has passed a socket: leave --listen out, or start the service without its socket unit"), l.Close())
	case l != nil:
		return l, nil
	}
	if !filepath.IsAbs(path) {
		return nil, usagef("serve: --listen %s: it must be an absolute path", path)
	}
	// Who may connect is told by credentials, too; the mode keeps others out who
	// have no business here.
	mode := os.FileMode(0o600)
	if len(rules.Service.UIDs)+len(rules.Service.GIDs) > 0 {
		mode = 0o666
	}
	return service.Listen(path, mode)
}

// notify tells systemd; nobody else listens.
func notify(log *logrus.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warnf("tell systemd %s: %v", state, err)
	}
}
